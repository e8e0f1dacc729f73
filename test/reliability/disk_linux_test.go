package reliability

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// mount puts the data of each member, and the audit log of each proxy, on a small file system.
func (s *site) mount() {
	s.t.Helper()
	small := func(dir, size string) error {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := syscall.Mount("none", dir, "tmpfs", 0, "mode=700,size="+size); err != nil {
			return err
		}
		s.t.Cleanup(func() {
			if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
				s.t.Error(err)
			}
		})
		s.mounts = append(s.mounts, dir)
		return nil
	}
	for _, name := range []string{"proxy-0", "proxy-1"} {
		err := small(s.auditDir(name), "8m")
		if errors.Is(err, syscall.EPERM) {
			s.t.Logf("without full disks: only root can mount a small file system: %v", err)
			return
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	for _, m := range s.cluster.Members {
		m.Stop(within)
		before := m.DataDir + "-before"
		if err := os.Rename(m.DataDir, before); err != nil {
			s.t.Fatal(err)
		}
		if err := small(m.DataDir, "600m"); err != nil {
			s.t.Fatal(err)
		}
		if err := errors.Join(os.CopyFS(m.DataDir, os.DirFS(before)), os.RemoveAll(before)); err != nil {
			s.t.Fatal(err)
		}
		m.Begin()
	}
	for _, m := range s.cluster.Members {
		m.WaitReady()
	}
}

func (s *site) auditDir(name string) string {
	dir := filepath.Join(s.Dir, name+"-audit")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	return dir
}

func disks(s *site) string {
	if len(s.mounts) == 0 {
		return "only root can mount a small file system"
	}
	return ""
}

// fill leaves no space on a file system. The returned function frees it.
func (s *site) fill(dir string) func() {
	s.t.Helper()
	path := filepath.Join(dir, "ballast")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer file.Close()
	for chunk := make([]byte, 1<<20); ; {
		if _, err := file.Write(chunk); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			s.t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			s.t.Error(err)
		}
	}
}

// fillMember fills the disk of a member, which ends if it cannot write, perhaps only after a while.
func (s *site) fillMember() func() {
	s.t.Helper()
	m := s.anyMember()
	free := s.fill(m.DataDir)
	return func() {
		free()
		ends := 0
		conn := harness.Dial(s.t, m.Address, nil)
		defer conn.Close()
		harness.Eventually(s.t, within, "the member to be back", func() error {
			if err := m.Alive(); err != nil {
				if ends++; ends > 2 { // the first time may be after the space was freed
					return err
				}
				s.report.note("members of etcd that ended because of a full disk")
				m.Begin()
			}
			ctx, cancel := context.WithTimeout(s.t.Context(), patience)
			defer cancel()
			_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("\x00"), CountOnly: true})
			return err
		})
	}
}

// fillAudit fills the disk of an audit log, and makes the proxy write records until it notices.
func (s *site) fillAudit() func() {
	s.t.Helper()
	n := rand.IntN(len(s.proxies))
	p := s.proxies[n]
	free := s.fill(filepath.Dir(s.audits[n]))
	harness.Eventually(s.t, within, "the proxy to notice the full disk", func() error {
		s.signal(p.Process, syscall.SIGHUP)
		if !strings.Contains(p.Report(), "[-]audit: ") {
			return errors.New("/readyz does not say so")
		}
		return p.Alive()
	})
	return func() {
		free()
		begun := time.Now()
		harness.Eventually(s.t, within, "the proxy to write its audit log again", func() error {
			if strings.Contains(p.Report(), "[-]audit: ") {
				return errors.New("it does not")
			}
			return nil
		})
		s.report.recovered("a proxy's audit log, from the end of the full disk", time.Since(begun))
	}
}
