package inventory

import (
	"log/slog"
	"maps"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// TestBypassFollows: what was watched goes on where it was, whatever rules are added or taken away
// around it; what is new begins with the rules.
func TestBypassFollows(t *testing.T) {
	rules := func(prefixes ...string) *Rules {
		var list []Rule
		for _, p := range prefixes {
			list = append(list, Rule{Prefix: p, WriteWith: "kms"})
		}
		return NewRules(list)
	}
	for name, tt := range map[string]struct {
		was   map[string]int64
		rules *Rules
		want  map[string]int64
	}{
		"the start":        {nil, rules("/a/"), map[string]int64{}},
		"a reload unknown": {map[string]int64{"/a/": 5}, rules("/a/", "/b/"), map[string]int64{"/a/": 5}},
		"a new rule":       {map[string]int64{"/a/": 5}, rules("/a/", "/b/").Since(9), map[string]int64{"/a/": 5, "/b/": 10}},
		"a rule less":      {map[string]int64{"/a/": 5, "/b/": 6}, rules("/b/").Since(9), map[string]int64{"/b/": 6}},
		"a wider rule":     {map[string]int64{"/a/b/": 5}, rules("/a/").Since(9), map[string]int64{"/a/": 10}},
		"narrower rules":   {map[string]int64{"": 7}, rules("/a/", "/b/").Since(9), map[string]int64{"/a/": 7, "/b/": 7}},
		"nothing":          {map[string]int64{"": 7}, rules().Since(9), map[string]int64{}},
	} {
		b := NewBypassWatcher(BypassConfig{})
		b.next = tt.was
		if b.follow(tt.rules); !maps.Equal(b.next, tt.want) {
			t.Errorf("%s: %v, want %v", name, b.next, tt.want)
		}
	}
}

// TestBypassNext: a watch that is begun again goes on behind what it was told, and not behind what
// is still to come.
func TestBypassNext(t *testing.T) {
	rules := NewRules(nil)
	b := NewBypassWatcher(BypassConfig{Rules: func() *Rules { return rules }, Logger: slog.New(slog.DiscardHandler)})
	header := func(rev int64) *pb.ResponseHeader { return &pb.ResponseHeader{Revision: rev} }
	for i, step := range []struct {
		answer *pb.WatchResponse
		want   int64
	}{
		{&pb.WatchResponse{Header: header(7), Created: true}, 8},
		// begun again at 8, and not there yet
		{&pb.WatchResponse{Header: header(9), Created: true}, 8},
		{&pb.WatchResponse{Header: header(99), Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{ModRevision: 20}}, {Kv: &mvccpb.KeyValue{ModRevision: 30}}}}, 31},
		// more of it follows
		{&pb.WatchResponse{Header: header(99), Fragment: true, Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{ModRevision: 40}}}}, 40},
		{&pb.WatchResponse{Header: header(99), Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{ModRevision: 40}}}}, 41},
		{&pb.WatchResponse{Header: header(99)}, 100}, // progress
		{&pb.WatchResponse{Header: header(200), CompactRevision: 150, Canceled: true}, 150},
	} {
		if b.handle("/a/", step.answer); b.next["/a/"] != step.want {
			t.Errorf("step %d: %d, want %d", i, b.next["/a/"], step.want)
		}
	}
}
