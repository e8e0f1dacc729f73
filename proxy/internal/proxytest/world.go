package proxytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
)

// World is an etcd with the proxy before it, another one without, and somebody who writes to both.
type World struct {
	Tb     testing.TB
	Rules  rulesOfProxy
	Behind *etcdmodel.Store
	Bare   *etcdmodel.Store
	// Via asks the proxy.
	Via func(ctx context.Context, name string, request proto.Message) (proto.Message, error)

	mu      sync.Mutex
	between []etcdmodel.Write // what is still to come in this step
	Asked   int               // requests that etcd has got in this step
	written []proto.Message   // by others, in this step
}

// WorldsOwn are the prefixes of the proxies' own keys in a world: no program names such a key, and
// many a range of theirs reaches over all of them.
var WorldsOwn = []string{"own/", "s/own/"}

// rulesOfProxy are those of a proxy's.
type rulesOfProxy interface {
	Seal(ctx context.Context, dst, key, value []byte) ([]byte, error)
	Open(ctx context.Context, dst, key, stored []byte) ([]byte, error)
	Overlaps(key, rangeEnd []byte) bool
}

// NewWorld makes a world that holds nothing. The caller says how the proxy is asked.
func NewWorld(tb testing.TB, rules rulesOfProxy) *World {
	return &World{
		Tb: tb, Rules: rules,
		Behind: etcdmodel.New(etcdmodel.MaxOps, etcdmodel.Leases...), Bare: etcdmodel.New(etcdmodel.MaxOps, etcdmodel.Leases...),
	}
}

// KvMethods are the shapes of the KV service.
var KvMethods = map[string]struct{ Request, Answer proto.Message }{
	"Range": {&pb.RangeRequest{}, &pb.RangeResponse{}}, "Put": {&pb.PutRequest{}, &pb.PutResponse{}}, "DeleteRange": {&pb.DeleteRangeRequest{}, &pb.DeleteRangeResponse{}},
	"Txn": {&pb.TxnRequest{}, &pb.TxnResponse{}}, "Compact": {&pb.CompactionRequest{}, &pb.CompactionResponse{}},
}

// Ask is etcd behind the proxy. Others write before it answers.
func (w *World) Ask(ctx context.Context, full string, msg []byte, _ int) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.between {
		if b.Before == w.Asked {
			w.others(ctx, b.Request)
		}
	}
	w.Asked++
	request := proto.Clone(KvMethods[full[len("/etcdserverpb.KV/"):]].Request)
	if err := proto.Unmarshal(msg, request); err != nil {
		w.Tb.Errorf("what reaches etcd cannot be decoded: %v", err)
		return nil, err
	}
	if err := CheckSealed(w.Rules, request); err != nil {
		w.Tb.Error(err)
	}
	answer, err := w.Behind.Do(request)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(answer)
}

// others has others write, through a proxy of their own.
func (w *World) others(ctx context.Context, request proto.Message) {
	w.written = append(w.written, request)
	if p, ok := request.(*pb.PutRequest); ok {
		value, err := w.Rules.Seal(ctx, []byte{}, p.GetKey(), p.GetValue())
		if value == nil && err == nil {
			value = p.GetValue()
		}
		request = &pb.PutRequest{Key: p.GetKey(), Value: value, Lease: p.GetLease()}
	}
	_, _ = w.Behind.Do(request) // what cannot be written here cannot there
}

// CheckSealed inspects a request for etcd: it may hold no value under a rule that is not encrypted,
// nor have etcd compare or sort what is encrypted. What cannot be written, since it is to keep the
// value that is there, passes as it is.
func CheckSealed(rules rulesOfProxy, request proto.Message) error {
	switch r := request.(type) {
	case *pb.PutRequest:
		if _, err := rules.Open(context.Background(), nil, r.GetKey(), r.GetValue()); err != nil && !r.GetIgnoreValue() {
			return fmt.Errorf("a value reaches etcd that is not sealed: %v", r)
		}
	case *pb.RangeRequest:
		if r.GetSortTarget() == pb.RangeRequest_VALUE && rules.Overlaps(r.GetKey(), r.GetRangeEnd()) {
			return fmt.Errorf("etcd is to sort sealed values: %v", r)
		}
	case *pb.TxnRequest:
		for _, c := range r.GetCompare() {
			if (c.GetTarget() == pb.Compare_VALUE || len(c.GetValue()) > 0) && (rules.Overlaps(c.GetKey(), c.GetRangeEnd()) || rules.Overlaps(c.GetKey(), nil)) {
				return fmt.Errorf("etcd is to compare sealed values: %v", c)
			}
		}
		for _, op := range slices.Concat(r.GetSuccess(), r.GetFailure()) {
			m := op.ProtoReflect()
			if field := m.WhichOneof(m.Descriptor().Oneofs().Get(0)); field != nil {
				if err := CheckSealed(rules, m.Get(field).Message().Interface()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Step sends a request to both, and compares. What others have written meanwhile, they have written
// to the bare etcd before the request: all of it if there is an answer, since etcd was last asked
// for just that, and some of it if there is an error.
func (w *World) Step(s etcdmodel.Step) error {
	w.mu.Lock()
	w.between, w.Asked, w.written = s.Between, 0, nil
	w.mu.Unlock()
	name := strings.TrimSuffix(string(s.Request.ProtoReflect().Descriptor().Name()), "Request")
	if name == "Compaction" {
		name = "Compact"
	}
	got, gotErr := w.Via(context.Background(), name, s.Request)
	w.mu.Lock()
	defer w.mu.Unlock()
	var want proto.Message
	var wantErr error
	for n := len(w.written); n >= 0; n-- {
		at := w.Bare.Clone()
		for _, r := range w.written[:n] {
			_, _ = at.Do(r)
		}
		m, err := at.Do(s.Request)
		if n == len(w.written) {
			want, wantErr = m, err
		}
		if same := proto.Equal(status.Convert(err).Proto(), status.Convert(gotErr).Proto()); same && (err != nil || proto.Equal(m, got)) {
			for _, r := range w.written[n:] {
				_, _ = at.Do(r)
			}
			w.Bare = at
			return nil
		}
		if gotErr == nil {
			break
		}
	}
	if refused := errors.Is(status.Convert(gotErr).Err(), rpctypes.ErrGRPCTooManyOps); refused && guarded(s.Request) > etcdmodel.MaxOps {
		for _, r := range w.written {
			_, _ = w.Bare.Do(r)
		}
		return nil
	}
	w.Tb.Fatalf("%s %v\nmeanwhile %v (of %v)\nwant error %v, got %v\nanswer (-want +got):\n%s", name, s.Request, w.written, s.Between, wantErr, gotErr, cmp.Diff(want, got, protocmp.Transform()))
	return nil
}

// guarded is how many operations a transaction has, as etcd counts them, with the guards that the
// proxy may need at its root.
func guarded(request proto.Message) int {
	var compares int
	var depth func(r *pb.TxnRequest) int
	depth = func(r *pb.TxnRequest) int {
		compares += len(r.GetCompare())
		for _, c := range r.GetCompare() {
			if len(c.GetRangeEnd()) > 0 {
				compares++
			}
		}
		deepest := 0
		for _, op := range slices.Concat(r.GetSuccess(), r.GetFailure()) {
			if t := op.GetRequestTxn(); t != nil {
				deepest = max(deepest, depth(t))
			}
			if d := op.GetRequestDeleteRange(); d != nil && holdsWorldsOwn(d.GetKey(), d.GetRangeEnd()) {
				compares += len(WorldsOwn) // in its place are that many more
			}
		}
		return deepest + max(len(r.GetCompare()), len(r.GetSuccess()), len(r.GetFailure()))
	}
	txn, _ := request.(*pb.TxnRequest)
	most := depth(txn)
	return most + compares - len(txn.GetCompare())
}

// SameStored compares what the two hold.
func SameStored(tb testing.TB, rules rulesOfProxy, bare, behind *etcdmodel.Store) {
	tb.Helper()
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	stored, err := behind.Do(all)
	if err != nil {
		tb.Fatal(err)
	}
	got, _ := stored.(*pb.RangeResponse)
	for _, kv := range got.GetKvs() {
		if kv.Value, err = rules.Open(context.Background(), nil, kv.GetKey(), kv.GetValue()); err != nil {
			tb.Fatalf("stored: %v: %v", kv, err)
		}
	}
	want, err := bare.Do(all)
	if diff := cmp.Diff(want, stored, protocmp.Transform()); diff != "" || err != nil {
		tb.Fatalf("stored in the end (-want +got):\n%s%v", diff, err)
	}
}

// holdsWorldsOwn reports whether a range holds all keys of one of worldsOwn.
func holdsWorldsOwn(key, end []byte) bool {
	return slices.ContainsFunc(WorldsOwn, func(p string) bool {
		last := p + "\xff\xff\xff\xff"
		return bytes.Compare(key, []byte(p)) <= 0 && len(end) > 0 && (string(end) == "\x00" || string(end) > last)
	})
}

// RandomProgram is the same for the same seed.
func RandomProgram(seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, 0))
	program := make([]byte, 10+random.IntN(200))
	for i := range program {
		program[i] = byte(random.Uint32())
	}
	return program
}
