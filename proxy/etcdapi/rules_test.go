package etcdapi

import (
	"context"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// tagger seals to its own name, so that a test sees which rule was asked.
type tagger string

func (s tagger) TrySeal(dst, _, _ []byte) ([]byte, error) { return append(dst, s...), nil }
func (s tagger) TryOpen(dst, _, _ []byte) ([]byte, error) { return append(dst, s...), nil }
func (s tagger) Seal(_ context.Context, dst, _, _ []byte) ([]byte, error) {
	return append(dst, s...), nil
}
func (s tagger) Open(_ context.Context, dst, _, _ []byte) ([]byte, error) {
	return append(dst, s...), nil
}

func rulesOf(t testing.TB, prefixes ...string) *RuleSet {
	t.Helper()
	var rules []Rule
	for _, p := range prefixes {
		rules = append(rules, Rule{Prefix: p, Sealer: tagger("<" + p + ">")})
	}
	set, err := NewRuleSet(rules)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// TestLongestPrefixIsAsked: which one it is, and what a range meets, is tested where prefixes are.
func TestLongestPrefixIsAsked(t *testing.T) {
	set := rulesOf(t, "a", "ab", "b/")
	for key, want := range map[string]string{"a": "<a>", "aa": "<a>", "abc": "<ab>", "b": "plain", "b/": "<b/>", "c": "plain"} {
		sealed, err := set.Seal(t.Context(), []byte{}, []byte(key), []byte("plain"))
		if covered := sealed != nil; covered != set.Covers([]byte(key)) {
			t.Errorf("key %q: sealed: %t", key, covered)
		}
		if sealed == nil { // it stays as it is
			sealed = []byte("plain")
		}
		opened, oerr := set.Open(t.Context(), nil, []byte(key), []byte("plain"))
		if string(sealed) != want || string(opened) != want || err != nil || oerr != nil {
			t.Errorf("key %q: sealed by %q and opened by %q, want %q (%v, %v)", key, sealed, opened, want, err, oerr)
		}
	}
}

// TestOwnKeys: no rule holds for them, not even the one of every key, and nobody puts there.
func TestOwnKeys(t *testing.T) {
	for name, rules := range map[string][]Rule{"no rules": nil, "every key": {{Prefix: "", Sealer: tagger("<>")}}} {
		set, err := NewRuleSet(rules, "/own/")
		if err != nil {
			t.Fatal(err)
		}
		key := []byte("/own/k")
		if _, err := set.Seal(t.Context(), []byte{}, key, []byte("v")); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: a put: %v", name, err)
		}
		if got, err := set.Open(t.Context(), nil, key, []byte("v")); string(got) != "v" || err != nil {
			t.Errorf("%s: a read: %q, %v", name, got, err)
		}
		if set.covers(key) || set.Own.reach(key, nil) != reachesOwn || set.empty() || set.covers([]byte("/own")) != (rules != nil) {
			t.Errorf("%s: the keys are taken for others", name)
		}
	}
}

func TestRuleErrors(t *testing.T) {
	_, err := NewRuleSet([]Rule{{Prefix: "a"}, {Prefix: "b", Sealer: tagger("")}, {Prefix: "b", Sealer: tagger("")}}, "/own", "/")
	for _, want := range []string{`rule "a": no sealer`, `rule "b": a second rule`, `own prefix "/own": it does not end`, `own prefix "/": it`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: no %q", err, want)
		}
	}
}

// TestEveryMethodIsClassified walks the services that etcd's API knows and fails on a method that
// the table does not, has in another shape, or has and etcd has not.
func TestEveryMethodIsClassified(t *testing.T) {
	want := map[string]Shape{
		// These services' descriptors belong to etcd's server; the tests against a real etcd walk
		// them there.
		"/v3electionpb.Election/Campaign": ShapeUnary, "/v3electionpb.Election/Proclaim": ShapeUnary, "/v3electionpb.Election/Leader": ShapeUnary,
		"/v3electionpb.Election/Observe": ShapeServerStream, "/v3electionpb.Election/Resign": ShapeUnary,
		"/v3lockpb.Lock/Lock": ShapeUnary, "/v3lockpb.Lock/Unlock": ShapeUnary,
	}
	for _, file := range []protoreflect.FileDescriptor{pb.File_rpc_proto, healthpb.File_grpc_health_v1_health_proto} {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				sh := ShapeUnary
				switch {
				case m.IsStreamingClient():
					sh = ShapeBidiStream
				case m.IsStreamingServer():
					sh = ShapeServerStream
				}
				want[fmt.Sprintf("/%s/%s", s.FullName(), m.Name())] = sh
			}
		}
	}
	if len(want) < 45 {
		t.Fatalf("only %d methods found: the test looks in the wrong place", len(want))
	}
	for _, m := range MethodTable() {
		sh, ok := want[m.Path]
		switch {
		case !ok:
			t.Errorf("%s is not a method of etcd, or stands twice", m.Path)
		case sh != m.Shape:
			t.Errorf("%s has shape %d, want %d", m.Path, m.Shape, sh)
		case m.class != classPass && m.class != classRewrite && m.class != classHost && m.class != classMembers && m.class != classCheck && m.class != classDelete:
			t.Errorf("%s has class %q", m.Path, m.class)
		case (m.class == classPass) != (m.call == nil):
			t.Errorf("%s: class %s does not fit its rewriter", m.Path, m.class)
		}
		delete(want, m.Path)
	}
	for m := range want {
		t.Errorf("%s is not classified", m)
	}
}

// TestKVValuesAreClassified: whatever request or answer of etcd's API can carry a value belongs to
// a method that is inspected.
func TestValuesAreClassified(t *testing.T) {
	classes := map[string]class{}
	for _, m := range MethodTable() {
		classes[m.Path] = m.class
	}
	services := pb.File_rpc_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			full := fmt.Sprintf("/%s/%s", s.FullName(), m.Name())
			carries := carriesValue(m.Input(), nil) || carriesValue(m.Output(), nil)
			if carries && classes[full] == classPass {
				t.Errorf("%s carries a value and is passed", full)
			}
		}
	}
}

func carriesValue(d protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) bool {
	if seen == nil {
		seen = map[protoreflect.FullName]bool{}
	}
	if seen[d.FullName()] {
		return false
	}
	seen[d.FullName()] = true
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		if f.Name() == "value" && f.Kind() == protoreflect.BytesKind {
			return true
		}
		if f.Message() != nil && carriesValue(f.Message(), seen) {
			return true
		}
	}
	return false
}

// TestWatchesThatTouch: a watch that can meet a rule in the eyes of any decoder is one that touches
// it.
func TestWatchesThatTouch(t *testing.T) {
	set := rulesOf(t, "k/")
	marshal := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for what, tt := range map[string]struct {
		msg     []byte
		touches bool
		bad     bool
	}{
		"inside":     {marshal(proxytest.CreateWatch("k/1", "")), true, false},
		"outside":    {marshal(proxytest.CreateWatch("a", "b")), false, false},
		"everything": {marshal(proxytest.CreateWatch("", "\x00")), true, false},
		"merged":     {append(marshal(proxytest.CreateWatch("a", "")), marshal(proxytest.CreateWatch("b", "z"))...), true, false},
		"progress":   {marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}), false, false},
		"truncated":  {marshal(proxytest.CreateWatch("a", "b"))[:3], false, true},
	} {
		got, err := etcdwire.WatchRequest(tt.msg, tryRules{set})
		if got.Touches != tt.touches || (err != nil) != tt.bad {
			t.Errorf("watch %s: %v, %v", what, got, err)
		}
	}
}

// FuzzReachOfTxn: whatever a real decoder finds in a transaction, the proxy has found too.
func FuzzReachOfTxn(f *testing.F) {
	op := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(k), Value: []byte("v")}}}
	}
	nested := &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{op("k/1")}}}}
	for _, m := range []*pb.TxnRequest{{Success: []*pb.RequestOp{op("a"), op("k/2")}}, {Success: []*pb.RequestOp{nested}}, {Failure: []*pb.RequestOp{op("o/1")}}, {}} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	set := rulesOf(f, "k/")
	set.Own = newOwnKeys([]string{"o/"})
	f.Fuzz(func(t *testing.T, msg []byte) {
		got := &txnCall{kvCall: kvCall{rules: set}}
		if etcdwire.EachOperation(msg, got) != nil {
			return // it is refused
		}
		var txn pb.TxnRequest
		if proto.Unmarshal(msg, &txn) != nil {
			return
		}
		want := &txnCall{kvCall: kvCall{rules: set}}
		reachByDecoding(&txn, want)
		if want.touches != got.touches || want.changes != got.changes || want.own != got.own || want.over != got.over {
			t.Errorf("got %+v, decoder %+v", got, want)
		}
	})
}

func reachByDecoding(txn *pb.TxnRequest, c *txnCall) {
	for _, op := range append(txn.Success, txn.Failure...) {
		switch op := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			c.Range(op.RequestRange.Key, op.RequestRange.RangeEnd)
		case *pb.RequestOp_RequestPut:
			c.Put(op.RequestPut.Key)
		case *pb.RequestOp_RequestDeleteRange:
			c.Delete(op.RequestDeleteRange.Key, op.RequestDeleteRange.RangeEnd)
		case *pb.RequestOp_RequestTxn:
			reachByDecoding(op.RequestTxn, c)
		}
	}
}
