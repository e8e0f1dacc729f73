package etcdapi

import (
	"bytes"
	"log/slog"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// TestElectionsAndLocks: what a rule covers is served here, unless the client is given stored
// bytes, and what it does not goes to etcd.
func TestElectionsAndLocks(t *testing.T) {
	rules, err := NewRuleSet([]Rule{{Prefix: "/r/secrets/", Sealer: proxytest.Reverser{}}})
	if err != nil {
		t.Fatal(err)
	}
	c := NewCore(nil, 0, slog.New(slog.DiscardHandler))
	c.Rules.Store(rules)
	table := make(map[string]*Method)
	for _, m := range MethodTable() {
		table[m.name] = m
	}
	name := func(n string) []byte { return append([]byte{0x0a, byte(len(n))}, n...) }
	leader := func(k string) []byte {
		inner := append([]byte{0x12, byte(len(k))}, k...)
		return append([]byte{0x0a, byte(len(inner))}, inner...)
	}
	for _, tt := range []struct {
		Method string
		msg    []byte
		hosted bool
	}{
		{"Lock", name("/r/secrets"), true},
		{"Lock", name("/r/secrets/mine"), true},
		{"Lock", name("/r"), true}, // a rule covers some of the names below
		{"Lock", name("/r/sec"), false},
		{"Unlock", name("/r/secrets/mine/1"), true},
		{"Unlock", name("/r/1"), false},
		{"Campaign", name("/r/secrets"), true},
		{"Campaign", name("/e"), false},
		{"Leader", name("/r/secrets"), true},
		{"Observe", name("/r/secrets"), true},
		{"Proclaim", leader("/r/secrets/1"), true},
		{"Resign", leader("/r/secrets/1"), true},
		{"Resign", leader("/r/other/1"), false},
	} {
		for _, ciphertext := range []bool{false, true} {
			own, _ := table[tt.Method].call(c, &listener.Identity{Ciphertext: ciphertext}, new(CallMemory)).(*electionCall)
			out, err := own.Request(NonBlocking, tt.msg)
			if err != nil || !bytes.Equal(out, tt.msg) || own.hosted != (tt.hosted && !ciphertext) {
				t.Errorf("%s %q, ciphertext %t: hosted %t, %q, %v", tt.Method, tt.msg, ciphertext, own.hosted, out, err)
			}
		}
	}
}
