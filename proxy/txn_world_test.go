package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdmodel"
)

// world is an etcd with the proxy before it, another one without, and somebody who writes to both.
type world struct {
	tb     testing.TB
	core   *core
	behind *etcdmodel.Store
	bare   *etcdmodel.Store
	// via asks the proxy; nil: its rewriter alone, without an engine.
	via func(ctx context.Context, name string, request proto.Message) (proto.Message, error)

	mu      sync.Mutex
	between []etcdmodel.Write // what is still to come in this step
	asked   int               // requests that etcd has got in this step
	written []proto.Message   // by others, in this step
}

// worldsOwn are the prefixes of the proxies' own keys in a world: no program names such a key, and
// many a range of theirs reaches over all of them.
var worldsOwn = []string{"own/", "s/own/"}

func newWorld(tb testing.TB) *world {
	rules, err := newRuleSet(scrambling(), worldsOwn...)
	if err != nil {
		tb.Fatal(err)
	}
	w := &world{
		tb: tb, core: newCore(nil, DefaultMaxRequestBytes, slog.New(slog.DiscardHandler)),
		behind: etcdmodel.New(etcdmodel.MaxOps, etcdmodel.Leases...), bare: etcdmodel.New(etcdmodel.MaxOps, etcdmodel.Leases...),
	}
	w.core.rules.Store(rules)
	return w
}

// kvMethods are the shapes of the KV service.
var kvMethods = map[string]struct{ request, answer proto.Message }{
	"Range": {&pb.RangeRequest{}, &pb.RangeResponse{}}, "Put": {&pb.PutRequest{}, &pb.PutResponse{}}, "DeleteRange": {&pb.DeleteRangeRequest{}, &pb.DeleteRangeResponse{}},
	"Txn": {&pb.TxnRequest{}, &pb.TxnResponse{}}, "Compact": {&pb.CompactionRequest{}, &pb.CompactionResponse{}},
}

// ask is etcd behind the proxy. Others write before it answers.
func (w *world) ask(ctx context.Context, full string, msg []byte, _ int) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.between {
		if b.Before == w.asked {
			w.others(ctx, b.Request)
		}
	}
	w.asked++
	request := proto.Clone(kvMethods[full[len("/etcdserverpb.KV/"):]].request)
	if err := proto.Unmarshal(msg, request); err != nil {
		w.tb.Errorf("what reaches etcd cannot be decoded: %v", err)
		return nil, err
	}
	if err := checkSealed(w.core.rules.Load(), request); err != nil {
		w.tb.Error(err)
	}
	answer, err := w.behind.Do(request)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(answer)
}

// others has others write, through a proxy of their own.
func (w *world) others(ctx context.Context, request proto.Message) {
	w.written = append(w.written, request)
	if p, ok := request.(*pb.PutRequest); ok {
		value, _ := w.core.rules.Load().Seal(ctx, p.GetKey(), p.GetValue())
		request = &pb.PutRequest{Key: p.GetKey(), Value: value, Lease: p.GetLease()}
	}
	_, _ = w.behind.Do(request) // what cannot be written here cannot there
}

// checkSealed looks into a request for etcd: it may hold no value under a rule that is not sealed, nor have etcd compare or sort what is sealed. What cannot be written, since it is to keep the
// value that is there, passes as it is.
func checkSealed(rules *ruleSet, request proto.Message) error {
	switch r := request.(type) {
	case *pb.PutRequest:
		if _, err := rules.Open(context.Background(), r.GetKey(), r.GetValue()); err != nil && !r.GetIgnoreValue() {
			return fmt.Errorf("a value reaches etcd that is not sealed: %v", r)
		}
	case *pb.RangeRequest:
		if r.GetSortTarget() == pb.RangeRequest_VALUE && rules.Overlaps(r.GetKey(), r.GetRangeEnd()) {
			return fmt.Errorf("etcd is to sort sealed values: %v", r)
		}
	case *pb.TxnRequest:
		for _, c := range r.GetCompare() {
			if (c.GetTarget() == pb.Compare_VALUE || len(c.GetValue()) > 0) && (rules.Overlaps(c.GetKey(), c.GetRangeEnd()) || rules.covers(c.GetKey())) {
				return fmt.Errorf("etcd is to compare sealed values: %v", c)
			}
		}
		for _, op := range slices.Concat(r.GetSuccess(), r.GetFailure()) {
			m := op.ProtoReflect()
			if field := m.WhichOneof(m.Descriptor().Oneofs().Get(0)); field != nil {
				if err := checkSealed(rules, m.Get(field).Message().Interface()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// through has the proxy's rewriter serve a request, as an engine does.
func (w *world) through(ctx context.Context, name string, request proto.Message) (proto.Message, error) {
	var c call = &compactCall{}
	for _, row := range methodTable() {
		if row.service == "etcdserverpb.KV" && row.name == name && row.call != nil {
			c = row.call(w.core, &Identity{})
		}
	}
	msg, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		w.tb.Fatal(err)
	}
	before := bytes.Clone(msg)
	out, err := c.request(blocking(ctx), msg)
	if err != nil {
		return nil, err
	}
	var answer []byte
	if x, ok := c.(exchanger); ok && x.exchanges() {
		answer, err = x.exchange(ctx, msg, w.ask)
	} else if answer, err = w.ask(ctx, "/etcdserverpb.KV/"+name, out, 0); err == nil && c.scans() {
		answer, err = c.response(blocking(ctx), answer)
	}
	if !bytes.Equal(msg, before) {
		w.tb.Fatal("the client's message was changed")
	}
	if err != nil {
		return nil, err
	}
	m := proto.Clone(kvMethods[name].answer)
	if err := proto.Unmarshal(answer, m); err != nil {
		w.tb.Fatal(err)
	}
	return m, nil
}

// compactCall rewrites nothing.
type compactCall struct{ electionCall }

func (*compactCall) request(_ mode, msg []byte) ([]byte, error) { return msg, nil }

// step sends a request to both, and compares. What others have written meanwhile, they have written to the bare etcd before the request: all of it if there is an answer, since etcd was last asked
// for just that, and some of it if there is an error.
func (w *world) step(s etcdmodel.Step) error {
	w.mu.Lock()
	w.between, w.asked, w.written = s.Between, 0, nil
	w.mu.Unlock()
	name := strings.TrimSuffix(string(s.Request.ProtoReflect().Descriptor().Name()), "Request")
	if name == "Compaction" {
		name = "Compact"
	}
	via := w.via
	if via == nil {
		via = w.through
	}
	got, gotErr := via(context.Background(), name, s.Request)
	w.mu.Lock()
	defer w.mu.Unlock()
	var want proto.Message
	var wantErr error
	for n := len(w.written); n >= 0; n-- {
		at := w.bare.Clone()
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
			w.bare = at
			return nil
		}
		if gotErr == nil {
			break
		}
	}
	if refused := errors.Is(status.Convert(gotErr).Err(), rpctypes.ErrGRPCTooManyOps); refused && guarded(s.Request) > etcdmodel.MaxOps {
		for _, r := range w.written {
			_, _ = w.bare.Do(r)
		}
		return nil
	}
	w.tb.Fatalf("%s %v\nmeanwhile %v (of %v)\nwant error %v, got %v\nanswer (-want +got):\n%s", name, s.Request, w.written, s.Between, wantErr, gotErr, cmp.Diff(want, got, protocmp.Transform()))
	return nil
}

// guarded is how many operations a transaction has, as etcd counts them, with the guards that the proxy may need at its root.
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
			if newOwnKeys(worldsOwn).over(op) != nil {
				compares += len(worldsOwn) // in its place are that many more
			}
		}
		return deepest + max(len(r.GetCompare()), len(r.GetSuccess()), len(r.GetFailure()))
	}
	txn, _ := request.(*pb.TxnRequest)
	most := depth(txn)
	return most + compares - len(txn.GetCompare())
}

// sameStored compares what the two hold.
func sameStored(tb testing.TB, rules *ruleSet, bare, behind *etcdmodel.Store) {
	tb.Helper()
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	stored, err := behind.Do(all)
	if err != nil {
		tb.Fatal(err)
	}
	got, _ := stored.(*pb.RangeResponse)
	for _, kv := range got.GetKvs() {
		if kv.Value, err = rules.Open(context.Background(), kv.GetKey(), kv.GetValue()); err != nil {
			tb.Fatalf("stored: %v: %v", kv, err)
		}
	}
	want, err := bare.Do(all)
	if diff := cmp.Diff(want, stored, protocmp.Transform()); diff != "" || err != nil {
		tb.Fatalf("stored in the end (-want +got):\n%s%v", diff, err)
	}
}
