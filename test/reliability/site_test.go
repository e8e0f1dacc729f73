package reliability

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	prefix   = "/s/"
	provider = "kms"
	// snapshotCount is how many entries etcd's log gets before a snapshot; few, so that there are
	// many.
	snapshotCount = 500
)

// site is an etcd of three members, two proxies in front of it, and the KMS of both, a process of
// its own. All networks between them can fail.
type site struct {
	*harness.Env
	t           *testing.T
	cluster     *harness.Cluster
	proxies     []*harness.Proxy
	plugin      *harness.Plugin
	clientLinks []*harness.Relay   // to each proxy
	memberLinks [][]*harness.Relay // from each proxy to each member
	capture     *harness.Capture
	mounts      []string       // small file systems; empty if they cannot be mounted
	audits      []string       // the audit log of each proxy
	clockFile   string         // moves the clock of the last proxy; empty if it cannot be moved
	keys        int            // versions of the KMS key
	only        *regexp.Regexp // the names of the faults to make
	periods     int
	load        *load // of the current period
	report      *report
}

func newSite(t *testing.T, clock bool) *site {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_CORE, &limit); err == nil {
		limit.Cur = limit.Max
		if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &limit); err != nil {
			t.Fatal(err)
		}
	}
	s := &site{Env: harness.New(t), t: t, keys: 1}
	// Every crash of a proxy would write a core dump, if the proxy did not prevent it.
	s.ProxyEnv = []string{"GOTRACEBACK=crash"}
	s.report = newReport(s)
	s.report.CoresWritten = s.dumps()
	s.capture = s.NewCapture()
	s.cluster = s.StartCluster(3, harness.EtcdConfig{Version: first, Relayed: true, Flags: []string{
		"--snapshot-count", fmt.Sprint(snapshotCount), "--max-wals", "2", "--max-snapshots", "2",
	}})
	for _, r := range s.cluster.Peers {
		r.Capture(s.capture)
	}
	s.mount()
	binary := ""
	if clock {
		binary = s.buildClock()
	}
	s.plugin = s.StartPlugin("kms", provider, s.LocalKey(provider, s.keys))
	for n := range 2 {
		name := fmt.Sprintf("proxy-%d", n)
		var urls []string
		var links []*harness.Relay
		for _, m := range s.cluster.Members {
			r := s.StartRelay(m.Address)
			r.Capture(s.capture)
			urls, links = append(urls, r.URL), append(links, r)
		}
		s.memberLinks = append(s.memberLinks, links)
		s.audits = append(s.audits, filepath.Join(s.auditDir(name), "audit.jsonl"))
		p := s.NewProxy(name, harness.ProxyConfig{
			Etcd:  harness.Upstream{Endpoints: urls},
			KMS:   []harness.KMSConfig{{Name: provider, PollInterval: "1s", Plugin: &harness.PluginKMS{Endpoint: s.plugin.Socket, Timeout: "1s"}}},
			Rules: []harness.Rule{{Prefix: prefix, WriteWith: provider, AllowPlaintextReads: new(bool)}},
			// Values can be decrypted for a short time without the KMS, so that its faults matter.
			Cache: &harness.Cache{TTL: "2s", ServeUnreachableFor: "1s", SealUnreachableFor: "2s"},
			Audit: &harness.Audit{Path: s.audits[n], Required: true},
			Log:   harness.LogConfig{Level: "info"},
		})
		if n == 1 {
			p.Binary = binary
		}
		p.Start()
		p.WaitReady(within)
		s.proxies = append(s.proxies, p)
		s.clientLinks = append(s.clientLinks, s.StartRelay(p.Address))
	}
	s.report.Started = time.Now()
	return s
}

// dumps reports whether this system writes a core dump of a program that crashes, next to it.
func (s *site) dumps() bool {
	s.t.Helper()
	dir := filepath.Join(s.Dir, "control")
	if err := os.Mkdir(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	control := exec.Command("sleep", "60")
	control.Dir = dir
	if err := control.Start(); err != nil {
		s.t.Fatal(err)
	}
	if err := control.Process.Signal(syscall.SIGABRT); err != nil {
		s.t.Fatal(err)
	}
	_ = control.Wait() // it was killed
	entries, err := os.ReadDir(dir)
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		s.t.Fatal(err)
	}
	return len(entries) > 0
}

// rotate adds a version to the KMS key.
func (s *site) rotate() {
	s.t.Helper()
	s.keys++
	next := s.LocalKey("next", s.keys).Local.KeyFile
	if err := os.Rename(next, filepath.Join(s.Dir, provider+"-key.yaml")); err != nil {
		s.t.Fatal(err)
	}
}

// advance lets each member apply n further entries.
func (s *site) advance(n int) {
	s.t.Helper()
	conn := harness.Dial(s.t, s.cluster.Leader().Address, nil)
	defer conn.Close()
	var last int64
	for range n {
		r, err := pb.NewKVClient(conn).Put(s.t.Context(), &pb.PutRequest{Key: []byte("/advance")})
		if err != nil {
			s.t.Fatal(err)
		}
		last = r.Header.Revision
	}
	for _, m := range s.cluster.Members {
		harness.Eventually(s.t, within, "a member to apply them", func() error {
			return s.maintain(m, func(ctx context.Context, c pb.MaintenanceClient) error {
				r, err := c.Status(ctx, &pb.StatusRequest{})
				if err == nil && r.Header.Revision < last {
					err = fmt.Errorf("revision %d of %d", r.Header.Revision, last)
				}
				return err
			})
		})
	}
}

// kv returns a client of a proxy whose network does not fail, for the checks.
func (s *site) kv(n int) (pb.KVClient, func()) {
	conn := harness.Dial(s.t, s.proxies[n%2].Address, nil)
	return pb.NewKVClient(conn), func() { conn.Close() }
}

// write writes a value while nothing fails.
func (s *site) write(n int, key, value string) {
	s.t.Helper()
	kv, done := s.kv(n)
	defer done()
	harness.Eventually(s.t, within, "a write", func() error {
		ctx, cancel := context.WithTimeout(s.t.Context(), patience)
		defer cancel()
		_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
		return err
	})
}

// stored is what etcd has of a key.
type stored struct {
	value   string
	version int64
}

// list reads all keys below a prefix through a proxy, in pages.
func (s *site) list(n int, base string) map[string]stored {
	s.t.Helper()
	kv, done := s.kv(n)
	defer done()
	all := make(map[string]stored)
	var revision int64
	for from := base; ; {
		var page *pb.RangeResponse
		harness.Eventually(s.t, within, "a list", func() (err error) {
			ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
			defer cancel()
			page, err = kv.Range(ctx, &pb.RangeRequest{Key: []byte(from), RangeEnd: after(base), Limit: 1000, Revision: revision})
			return err
		})
		for _, pair := range page.Kvs {
			all[string(pair.Key)] = stored{string(pair.Value), pair.Version}
			from = string(pair.Key) + "\x00"
		}
		if revision = page.Header.Revision; !page.More {
			return all
		}
	}
}

// after returns the end of the range of keys with a prefix that ends with a slash.
func after(base string) []byte { return []byte(strings.TrimSuffix(base, "/") + "0") }

// delete removes all keys below a prefix.
func (s *site) delete(base string) {
	s.t.Helper()
	kv, done := s.kv(0)
	defer done()
	harness.Eventually(s.t, within, "a delete", func() error {
		ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
		defer cancel()
		_, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(base), RangeEnd: after(base)})
		return err
	})
}

// encrypted checks that etcd itself has nothing else than ciphertext below a prefix.
func (s *site) encrypted(base string) {
	s.t.Helper()
	conn := harness.Dial(s.t, s.cluster.Members[0].Address, nil)
	defer conn.Close()
	from := base
	for more := true; more; {
		ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
		page, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(from), RangeEnd: after(base), Limit: 1000})
		cancel()
		if err != nil {
			s.t.Fatal(err)
		}
		for _, pair := range page.Kvs {
			if !strings.HasPrefix(string(pair.Value), "k8s:enc:kms:v2:"+provider+":") {
				s.t.Errorf("etcd has %s, and not encrypted", pair.Key)
			}
			from = string(pair.Key) + "\x00"
		}
		more = page.More
	}
}

func fetch(url string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

// finish ends all processes, searches every file for plaintext, and writes the report.
func (s *site) finish() {
	s.t.Helper()
	s.agreed(s.cluster.Members[0].Version)
	for _, p := range s.proxies {
		p.Scrape()
		if !p.Stop(within) {
			s.t.Error("a proxy does not end")
		}
	}
	for n, path := range s.audits {
		out, code := s.Run("audit", "verify", path)
		s.t.Logf("audit verify of proxy %d: exit code %d: %s", n, code, strings.TrimSpace(out))
	}
	s.plugin.Stop(within)
	for _, m := range s.cluster.Members {
		m.Stop(within)
	}
	found, err := s.Sealed.Files(s.searched()...)
	if err != nil {
		s.t.Error(err)
	}
	for _, f := range found {
		s.t.Errorf("plaintext in a file: %v", f)
	}
	if err := filepath.WalkDir(s.Dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		s.report.Files++
		s.report.FileBytes += info.Size()
		if strings.HasPrefix(entry.Name(), "core") {
			s.report.Cores++
		}
		return err
	}); err != nil {
		s.t.Error(err)
	}
	if s.report.Cores > 0 {
		s.t.Errorf("there are %d core dumps", s.report.Cores)
	}
	captured, sent := s.capture.Result()
	s.report.CapturedBytes, s.report.Plaintext = captured, len(found)+len(sent)
	if captured == 0 {
		s.t.Error("no traffic was captured")
	}
	s.report.write()
}

// searched returns the files and folders that must not have plaintext: all but the keys of the KMS.
func (s *site) searched() (paths []string) {
	entries, err := os.ReadDir(s.Dir)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), "-key.yaml") {
			paths = append(paths, filepath.Join(s.Dir, entry.Name()))
		}
	}
	if len(paths) < 5 {
		s.t.Error(errors.New("there is hardly anything to search"))
	}
	return paths
}
