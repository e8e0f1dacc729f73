package etcdapi

import (
	"bytes"
	"context"
	"log/slog"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// compactCall rewrites nothing.
type compactCall struct{ electionCall }

func (*compactCall) Request(_ Mode, msg []byte) ([]byte, error) { return msg, nil }

// callWorld is a world whose requests go through the calls, without an engine.
type callWorld struct {
	*proxytest.World
	core *Core
}

func newCallWorld(tb testing.TB) *callWorld {
	rules, err := NewRuleSet(scrambling(), proxytest.WorldsOwn...)
	if err != nil {
		tb.Fatal(err)
	}
	w := &callWorld{proxytest.NewWorld(tb, rules), NewCore(rules, 1536<<10, slog.New(slog.DiscardHandler))}
	w.Via = w.through
	return w
}

func scrambling() []Rule {
	first, second := proxytest.NewScramblers()
	return []Rule{{Prefix: "s/", Sealer: first}, {Prefix: "s/p/", Sealer: second}}
}

// through has the proxy's rewriter serve a request, as an engine does.
func (w *callWorld) through(ctx context.Context, name string, request proto.Message) (proto.Message, error) {
	var c Call = &compactCall{}
	for _, row := range MethodTable() {
		if row.service == "etcdserverpb.KV" && row.name == name && row.call != nil {
			c = row.call(w.core, &listener.Identity{}, new(CallMemory))
		}
	}
	msg, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		w.Tb.Fatal(err)
	}
	before := bytes.Clone(msg)
	out, err := c.Request(Blocking(ctx), msg)
	if err != nil {
		return nil, err
	}
	var answer []byte
	if x, ok := c.(Exchanger); ok && x.Exchanges() {
		answer, err = x.exchange(ctx, msg, w.Ask)
	} else if answer, err = w.Ask(ctx, "/etcdserverpb.KV/"+name, out, 0); err == nil && c.Scans() {
		answer, err = c.Response(Blocking(ctx), nil, answer)
	}
	if !bytes.Equal(msg, before) {
		w.Tb.Fatal("the client's message was changed")
	}
	if err != nil {
		return nil, err
	}
	m := proto.Clone(proxytest.KvMethods[name].Answer)
	if err := proto.Unmarshal(answer, m); err != nil {
		w.Tb.Fatal(err)
	}
	return m, nil
}
