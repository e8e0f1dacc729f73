package coordination

import (
	"errors"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestGuardWithoutLeader checks that with coordination off, the guard accepts the data of a member
// of etcd without a leader. The member serves clients what needs no leader, and its record leads to
// the same refusals as with a leader.
func TestGuardWithoutLeader(t *testing.T) {
	t.Parallel()
	s := &site{Env: harness.New(t)}
	cluster := s.StartCluster(3, harness.EtcdConfig{})
	// the member that remains; it stores what was read there with a leader
	s.before(t, cluster.Members[0].Address)
	off := s.cfg
	off.Coordination = harness.NoCoordination()
	value := s.Sealed.Value("a")
	serves := func(p *harness.Proxy) {
		t.Helper()
		p.WaitReady(within)
		r, err := pb.NewKVClient(harness.Dial(t, p.Address, nil)).Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix + "a"), Serializable: true})
		if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
			t.Errorf("a serializable read: %v, %v", r, err)
		}
	}

	// Without a record.
	p := s.StartProxy("off", off)
	p.WaitReady(within)
	if _, err := pb.NewKVClient(harness.Dial(t, p.Address, nil)).Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(value)}); err != nil {
		t.Fatal(err)
	}
	serves(p)
	p.Stop(within)
	cluster.LoseMajority()
	p.Start()
	serves(p)
	p.Stop(within)
	cluster.RegainMajority()

	// With a record below another prefix than the default, so that its pointer must be read too.
	s.cfg.Coordination = &harness.Coordination{Prefix: custom}
	first := s.StartProxy("first", s.cfg)
	first.WaitReady(within)
	s.place(t, custom, prefix)
	first.Stop(within)
	cluster.LoseMajority()
	plain := s.cfg.Rules[0]
	plain.WriteWith = "plaintext"
	weak := off
	weak.Rules = []harness.Rule{plain}
	const found = `coordination is off, and there is a record of rules below "/elsewhere/"`
	s.refused(t, "only off", off, found)
	s.refused(t, "weak", weak, found, "would be written as plaintext")

	// Allowed with the flag, although the record cannot be removed.
	p.Args = []string{"--allow-weakening"}
	p.Start()
	serves(p)
	harness.Eventually(t, within, "the log to say that the record is still there", func() error {
		if !strings.Contains(p.Log(), "the next start needs --allow-weakening too") {
			return errors.New("it does not")
		}
		return nil
	})
}
