package coordination

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
)

// settled is when a fleet has found its order again after anything that befell it once.
const settled = leaseSeconds*time.Second + fleetCheck + 10*time.Second

// rollOut has two proxies agree on rules, and changes them one after the other.
func rollOut(s *fleetSimulation) {
	for _, id := range []string{"a", "b"} {
		s.start(id, "old")
	}
	time.Sleep(settled)
	s.check("old", "a", "b")
	s.nextPhase()
	for _, id := range []string{"a", "b"} {
		s.fleets[id].SetPolicy(rulesOf("new"))
		time.Sleep(time.Second)
	}
	time.Sleep(settled)
	s.check("new", "a", "b")
}

// TestRollOutWithFaults: whatever call fails, applied or not, rules are on record once all proxies
// have them and not before.
func TestRollOutWithFaults(t *testing.T) {
	for _, applied := range []bool{false, true} {
		for _, failure := range []error{errAway, rpctypes.ErrGRPCTimeout} {
			t.Run(fmt.Sprint("applied ", applied, ", ", failure), func(t *testing.T) {
				t.Parallel()
				everyCall(t, rollOut, func(*fleetSimulation, *etcdtest.Call) etcdtest.Fault {
					return etcdtest.Fault{Err: failure, Applied: applied}
				})
			})
		}
	}
}

// TestRollOutWithOthers: streams that end, compactions, leases that are lost and announcements that
// are removed at any call change nothing in the end.
func TestRollOutWithOthers(t *testing.T) {
	for name, other := range map[string]func(s *fleetSimulation){
		"compacts":                func(s *fleetSimulation) { s.cluster.Compact(0) },
		"ends the streams":        func(s *fleetSimulation) { s.cluster.Cut() },
		"removes an announcement": func(s *fleetSimulation) { s.cluster.Delete(DefaultPrefix + "proxies/b") },
		"ends a lease":            func(s *fleetSimulation) { _ = s.cluster.Revoke(1001) },
		"damages the record":      func(s *fleetSimulation) { s.cluster.Put(DefaultPrefix+"agreement", "{") },
		"removes the record":      func(s *fleetSimulation) { s.cluster.Delete(DefaultPrefix + "agreement") },
		"forges the record": func(s *fleetSimulation) {
			s.cluster.Put(DefaultPrefix+"agreement", `{"policy":{"rules":"old"},"by":"nobody","proofs":{"main":"AAAA"}}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everyCall(t, rollOut, func(s *fleetSimulation, _ *etcdtest.Call) etcdtest.Fault { other(s); return etcdtest.Fault{} })
		})
	}
}

// TestRaceForTheRecord: a record that was written since it was read stays, at any call.
func TestRaceForTheRecord(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		raced := false
		var mine *etcdtest.Call
		s.hook = func(_ int, c *etcdtest.Call) etcdtest.Fault {
			if _, ok := c.Request.(*pb.TxnRequest); ok && !raced {
				raced, mine = true, c
				s.cluster.Put(DefaultPrefix+"agreement", `{"policy":{"rules":"of another proxy"}}`)
			}
			return etcdtest.Fault{}
		}
		s.after = func(c *etcdtest.Call, answer proto.Message) {
			if a, ok := answer.(*pb.TxnResponse); ok && c == mine && a.GetSucceeded() {
				t.Error("a record was replaced that had not been read")
			}
		}
		s.start("a", "old")
		time.Sleep(settled)
		synctest.Wait() // the hook has returned
		if !raced {
			t.Error("no record was written")
		}
		s.check("old", "a")
		s.stop()
	})
}

// TestCrashOfAProxy: a process that ends at any call is forgotten when its lease has ended; the
// others go on, and one of them leads.
func TestCrashOfAProxy(t *testing.T) {
	t.Parallel()
	crashed := ""
	everyCall(t, func(s *fleetSimulation) {
		crashed = ""
		for _, id := range []string{"a", "b", "c"} {
			s.start(id, "old")
		}
		time.Sleep(settled)
		var alive []string
		for _, id := range []string{"a", "b", "c"} {
			if id != crashed {
				alive = append(alive, id)
			}
		}
		s.check("old", alive...)
	}, func(s *fleetSimulation, c *etcdtest.Call) etcdtest.Fault {
		crashed = c.Client
		s.crash(c.Client)
		return etcdtest.Fault{Err: errAway}
	})
}

// TestRestore: each proxy notices that etcd was restored, once, and announces itself again; the
// record of the backup is replaced.
func TestRestore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		s.start("a", "old")
		s.start("b", "old")
		time.Sleep(settled)
		backup := s.cluster.Store().Clone()
		for i := range 20 {
			s.cluster.Put("/other", fmt.Sprint(i))
		}
		s.fleets["a"].SetPolicy(rulesOf("new"))
		s.fleets["b"].SetPolicy(rulesOf("new"))
		time.Sleep(settled)
		s.check("new", "a", "b")
		s.cluster.Restore(backup)
		time.Sleep(settled)
		s.check("new", "a", "b")
		if s.restored["a"] != 1 || s.restored["b"] != 1 {
			t.Errorf("restores that were noticed: %v", s.restored)
		}
		s.stop()
	})
}

// TestVerify: a record is genuine if each of its providers proves it; without a KMS nothing is
// known.
func TestVerify(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		f := s.start("a", "old")
		time.Sleep(settled)
		s.stop()
		read := func() *Agreement {
			r, err := f.Agreement(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		verify := func(what string, r *Agreement, wantOld bool, want error) {
			t.Helper()
			if old, err := f.Verify(t.Context(), r, []string{"main"}); old != wantOld || !errors.Is(err, want) {
				t.Errorf("%s: old %v, %v, want %v", what, old, err, want)
			}
		}
		verify("as it was written", read(), false, nil)
		forged := read()
		forged.Policy = []byte(`{"rules":"none"}`)
		verify("other rules", forged, false, ErrForged)
		forged = read()
		forged.Proofs["main"], _ = s.sealer().Seal(t.Context(), []byte("/another/key"), []byte("x"))
		verify("a proof of another key", forged, false, ErrForged)
		forged = read()
		forged.Proofs["main"] = []byte("plaintext")
		verify("a proof in plaintext", forged, false, ErrForged)
		forged = read()
		delete(forged.Proofs, "main")
		verify("no proof", forged, false, ErrForged)
		s.down = true
		verify("no KMS", read(), false, ErrUnverified)
		s.down, s.keyID = false, "2"
		f.cfg.ProofSealers["main"] = s.sealer()
		verify("after a rotation", read(), true, nil)
		f = s.start("a", "old")
		time.Sleep(settled)
		verify("once a proxy has written it again", read(), false, nil)
		s.stop()
	})
}

// TestAnotherPrefix: the record of a prefix that is no longer used goes once no proxy is announced
// there, whatever call fails.
func TestAnotherPrefix(t *testing.T) {
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprint("applied ", applied), func(t *testing.T) {
			t.Parallel()
			everyCall(t, func(s *fleetSimulation) {
				s.prefix = "/there/"
				s.start("a", "old")
				time.Sleep(settled)
				s.check("old", "a")
				s.prefix = "/here/"
				s.nextPhase()
				b := s.start("b", "old")
				time.Sleep(settled)
				s.check("old", "b")
				client := s.cluster.Client(s.t, "test")
				if there, err := OtherRecords(s.t.Context(), client, "/here/"); err != nil || len(there) != 1 || there[0].Prefix != "/there/" || there[0].Agreement == nil {
					s.t.Fatalf("while a proxy is there: %+v, %v", there, err)
				}
				s.nextPhase()
				s.stops["a"]()
				b.SetPolicy(rulesOf("old"))
				time.Sleep(settled)
				if there, err := OtherRecords(s.t.Context(), client, "/here/"); err != nil || len(there) != 0 {
					s.t.Fatalf("once no proxy is there: %+v, %v", there, err)
				}
				if pointed, err := OtherRecords(s.t.Context(), client, DefaultPrefix); err != nil || len(pointed) != 1 || pointed[0].Prefix != "/here/" {
					s.t.Fatalf("what a proxy of the default prefix finds: %+v, %v", pointed, err)
				}
			}, func(*fleetSimulation, *etcdtest.Call) etcdtest.Fault {
				return etcdtest.Fault{Err: errAway, Applied: applied}
			})
		})
	}
}
