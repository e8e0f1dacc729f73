package etcdapi

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// runProgram has a program get the same answers and errors through the proxy as from etcd alone,
// and leave the same behind, while others write between the requests that one transaction leads to.
// etcd sees no value under a rule, and compares and sorts none.
func runProgram(tb testing.TB, program []byte) {
	defer func() {
		if tb.Failed() {
			tb.Logf("to run it again, put this into testdata/fuzz/FuzzTxn:\ngo test fuzz v1\n[]byte(%q)", program)
		}
	}()
	w := newCallWorld(tb)
	_ = etcdmodel.NewProgram(program).Run(w.Bare.Rev, w.Step) // a difference ends the test
	proxytest.SameStored(tb, w.Rules, w.Bare, w.Behind)
}

// TestTxnPrograms runs programs at random.
func TestTxnPrograms(t *testing.T) {
	t.Parallel()
	first := rand.Uint64() >> 1
	for i := range uint64(1000) {
		seed := first + i
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runProgram(t, proxytest.RandomProgram(seed)) })
	}
}

func FuzzTxn(f *testing.F) {
	for seed := range uint64(40) {
		f.Add(proxytest.RandomProgram(seed))
	}
	f.Fuzz(func(t *testing.T, program []byte) { runProgram(t, program) })
}
