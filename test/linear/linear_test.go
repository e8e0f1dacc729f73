// Package linear checks with porcupine that what clients of several proxies saw, every key sealed, could have happened one after the other, while proxies and members of etcd are killed and the
// leader moves.
//
// LINEAR_ROUNDS is how often; each round lasts ten seconds.
package linear

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	within  = 60 * time.Second
	clients = 8
	keys    = 3
	patient = 3 * time.Second // for one answer
)

type kind int

const (
	get kind = iota
	put
	swap // if the value is what it is taken for
)

type input struct {
	key, value, old string
	kind            kind
}

type output struct {
	value   string
	swapped bool
	unknown bool // no answer: it may have been done, at any time since
}

// register is one key of etcd.
var register = porcupine.Model{
	Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		by := make(map[string][]porcupine.Operation)
		for _, op := range history {
			key := op.Input.(input).key
			by[key] = append(by[key], op)
		}
		for _, part := range by {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, in, out any) (bool, any) {
		now, i, o := state.(string), in.(input), out.(output)
		switch {
		case i.kind == get:
			return o.value == now, now
		case i.kind == put:
			return true, i.value
		case o.unknown && now == i.old:
			return true, i.value
		case o.unknown:
			return true, now
		case o.swapped:
			return now == i.old, i.value
		}
		return now != i.old, now
	},
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v → %+v", in, out) },
}

func TestLinearizable(t *testing.T) {
	t.Parallel()
	rounds, err := strconv.Atoi(os.Getenv("LINEAR_ROUNDS"))
	if err != nil {
		rounds = 1
	}
	s := newSite(t)
	for range rounds {
		s.round(t)
	}
}

type site struct {
	*harness.Env
	cluster *harness.Cluster
	proxies []*harness.Proxy

	mu      sync.Mutex
	history []porcupine.Operation
	begun   time.Time
	unknown int
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Env: harness.New(t)}
	s.cluster = s.StartCluster(3, harness.EtcdConfig{})
	kms := s.LocalKey("dev", 1)
	for n := range 2 {
		p := s.NewProxy(fmt.Sprintf("proxy-%d", n), harness.ProxyConfig{
			Etcd: harness.Upstream{Endpoints: s.cluster.URLs()}, KMS: []harness.KMSConfig{kms}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev", AllowPlaintextReads: new(false)}},
		})
		p.Start()
		p.WaitReady(within)
		s.proxies = append(s.proxies, p)
	}
	return s
}

// round runs clients beside kills, and checks what they saw.
func (s *site) round(t *testing.T) {
	t.Helper()
	s.history, s.begun, s.unknown = nil, time.Now(), 0
	prefix := fmt.Sprintf("/s/%d/", time.Now().UnixNano())
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for c := range clients {
		kv := pb.NewKVClient(harness.Dial(t, s.proxies[c%2].Address, nil))
		all.Go(func() { s.client(ctx, kv, c, prefix) })
	}
	length := 10 * time.Second
	if testing.Short() {
		length = 5 * time.Second
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		time.Sleep(time.Duration(200+rand.IntN(600)) * time.Millisecond) // a random moment is the point
		switch rand.IntN(3) {
		case 0:
			p := s.proxies[rand.IntN(2)]
			p.Kill()
			p.Start()
		case 1:
			m := s.cluster.Members[rand.IntN(3)]
			m.Kill()
			m.Start()
		default:
			s.moveLeader()
		}
	}
	stop()
	all.Wait()
	swapped := 0
	for i := range s.history {
		if s.history[i].Output.(output).swapped {
			swapped++
		}
	}
	t.Logf("%d operations, %d swaps, %d without an answer", len(s.history), swapped, s.unknown)
	if len(s.history) < 100 || swapped < 10 {
		t.Errorf("%d operations and %d swaps prove little", len(s.history), swapped)
	}
	result, info := porcupine.CheckOperationsVerbose(register, s.history, 2*time.Minute)
	if result == porcupine.Illegal {
		path := filepath.Join(os.TempDir(), "etcd-kms-proxy-linear.html")
		_ = porcupine.VisualizePath(register, info, path)
		t.Errorf("what clients saw cannot have happened: see %s", path)
	}
	if result == porcupine.Unknown {
		t.Log("the check took too long")
	}
}

// moveLeader asks the leader to go, if there is one.
func (s *site) moveLeader() {
	leader := s.cluster.Leader()
	conn := harness.Dial(s.TB, leader.Address, nil)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	members, err := pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{})
	if err != nil {
		return
	}
	to := members.Members[rand.IntN(len(members.Members))].ID
	_, _ = pb.NewMaintenanceClient(conn).MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: to}) // it may be the leader, or down
}

// client does one operation after the other.
func (s *site) client(ctx context.Context, kv pb.KVClient, id int, prefix string) {
	known := make(map[string]string)
	for n := 0; ctx.Err() == nil; n++ {
		in := input{key: fmt.Sprintf("%s%d", prefix, rand.IntN(keys)), value: s.Sealed.Value(fmt.Sprintf("%d-%d", id, n)), kind: kind(rand.IntN(3))}
		in.old = known[in.key]
		if in.kind == swap && in.old == "" {
			in.kind = get // an absent key does not compare
		}
		call := time.Since(s.begun).Nanoseconds()
		out, err := s.do(ctx, kv, in)
		returned := time.Since(s.begun).Nanoseconds()
		s.mu.Lock()
		if err != nil {
			s.unknown++
			out, returned = output{unknown: true}, 1<<62
		}
		if err == nil || in.kind != get {
			s.history = append(s.history, porcupine.Operation{ClientId: id, Input: in, Call: call, Output: out, Return: returned})
		}
		s.mu.Unlock()
		switch {
		case err != nil:
			// Who may still be at work is another client from now on, as porcupine sees it.
			id += clients
			time.Sleep(10 * time.Millisecond) // not a storm while something is down
		case in.kind == get:
			known[in.key] = out.value
		case in.kind == put || out.swapped:
			known[in.key] = in.value
		default:
			delete(known, in.key)
		}
	}
}

func (s *site) do(ctx context.Context, kv pb.KVClient, in input) (output, error) {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), patient)
	defer cancel()
	key := []byte(in.key)
	request := &pb.PutRequest{Key: key, Value: []byte(in.value)}
	switch in.kind {
	case get:
		r, err := kv.Range(limited, &pb.RangeRequest{Key: key})
		if err != nil || len(r.Kvs) == 0 {
			return output{}, err
		}
		return output{value: string(bytes.Clone(r.Kvs[0].Value))}, nil
	case put:
		_, err := kv.Put(limited, request)
		return output{}, err
	default:
		r, err := kv.Txn(limited, &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(in.old)}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: request}}},
		})
		return output{swapped: r.GetSucceeded()}, err
	}
}
