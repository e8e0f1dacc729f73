package coordination

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const custom = "/elsewhere/"

// TestGuardIsNotTurnedOff checks that an edit of the configuration file cannot turn the guard off:
// neither by `enabled` nor by another prefix. Removing the audit block must not prevent the audit
// record.
func TestGuardIsNotTurnedOff(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]string{"default prefix": "/etcd-kms-proxy/", "own prefix": "/fleet/keys/"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl"), Required: true}
			s.cfg.Coordination = &harness.Coordination{Prefix: at}
			first := s.StartProxy("first", s.cfg)
			first.WaitReady(within)
			s.place(t, at, prefix)
			first.Stop(within)

			plain := s.cfg.Rules[0]
			plain.WriteWith = "plaintext"
			weak, off, moved, unseen, lax := s.with(plain), s.with(plain), s.with(plain), s.cfg, s.cfg
			off.Coordination = harness.NoCoordination()
			moved.Coordination = &harness.Coordination{Prefix: custom}
			unseen.Audit = nil
			lax.Audit = &harness.Audit{Path: s.cfg.Audit.Path}
			s.refused(t, "weak", weak, "would be written as plaintext")
			s.refused(t, "off", off, "coordination is off, and there is a record of rules below "+fmt.Sprintf("%q", at), "would be written as plaintext")
			s.refused(t, "moved", moved, `coordination.prefix is "/elsewhere/"`, "would be written as plaintext")
			s.refused(t, "unseen", unseen, "there would be no audit log", "not serving")
			s.refused(t, "lax", lax, "audit.required would be false")
			// This also applies if the rules are unchanged.
			off.Rules, moved.Rules = s.cfg.Rules, s.cfg.Rules
			off.Coordination.Prefix = custom
			s.refused(t, "only off", off, "coordination is off")
			s.refused(t, "only moved", moved, "coordination.prefix is")
			off.Audit = nil
			s.refused(t, "off and unseen", off, "coordination is off", "there would be no audit log", "not serving")
			if got := s.get(t, custom+"agreement"); got != "" {
				t.Errorf("there is a second record: %s", got)
			}
			data, err := os.ReadFile(s.cfg.Audit.Path)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(data), `"event":"guard","outcome":"refused"`); n != 6 {
				t.Errorf("%d refusals in the audit log", n)
			}
			first.Start() // the agreement is unchanged
			first.WaitReady(within)
		})
	}
}

// place waits for a record of rules below a prefix.
func (s *site) place(t *testing.T, at, part string) {
	t.Helper()
	harness.Eventually(t, within, "the record below "+at, func() error {
		if got := s.get(t, at+"agreement"); !strings.Contains(got, part) {
			return fmt.Errorf("it is %q", got)
		}
		if at != "/etcd-kms-proxy/" {
			if n, err := s.kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/at/" + at)}); err != nil || n.Count != 1 {
				return fmt.Errorf("no pointer: %v, %w", n, err)
			}
		}
		return nil
	})
}

// gone waits until a record was deleted.
func (s *site) gone(t *testing.T, at string) {
	t.Helper()
	harness.Eventually(t, within, "the record below "+at+" to be gone", func() error {
		if got := s.get(t, at+"agreement") + s.get(t, "/etcd-kms-proxy/at/"+at); got != "" {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// TestGuardLetsMove checks that with --allow-weakening the prefix can change and coordination can
// be turned off, once per proxy, and that no outdated record remains.
func TestGuardLetsMove(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	p := s.StartProxy("first", s.cfg)
	p.WaitReady(within)
	s.place(t, "/etcd-kms-proxy/", prefix)

	// Change the prefix while another proxy still has the old one.
	s.cfg.Coordination = &harness.Coordination{Prefix: custom}
	moved := s.NewProxy("moved", s.cfg)
	moved.Args = []string{"--allow-weakening"}
	moved.Start()
	moved.WaitReady(within)
	s.place(t, custom, prefix)
	if got := s.get(t, agreement); got == "" {
		t.Error("the record of a proxy that still runs is gone")
	}
	p.Stop(within)
	moved.Stop(within)
	moved.Args = nil // there is a record below the new prefix now
	moved.Start()
	moved.WaitReady(within)
	s.gone(t, "/etcd-kms-proxy/")
	moved.Stop(within)

	// Turn coordination off.
	s.cfg.Coordination = harness.NoCoordination()
	off := s.NewProxy("off", s.cfg)
	off.Args = []string{"--allow-weakening"}
	off.Start()
	off.WaitReady(within)
	s.gone(t, custom)
	off.Stop(within)
	off.Args = nil
	off.Start()
	off.WaitReady(within)
}
