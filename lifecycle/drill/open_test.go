package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// TestOpen counts each value once, under its rule and its KMS key, with all values and with a
// sample.
func TestOpen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, first, second := etcdtest.New(t, 1), etcdtest.Sealer{KeyID: "1"}, etcdtest.Sealer{KeyID: "2"}
		put := func(s etcdtest.Sealer, key, at string) {
			stored, err := s.Seal(t.Context(), []byte(at), []byte("value"))
			if err != nil {
				t.Fatal(err)
			}
			c.Put(key, string(stored))
		}
		for i := range 10 {
			key := fmt.Sprintf("/r/a%d", i)
			put(first, key, key)
			key = fmt.Sprintf("/r/b%d", i)
			put(second, key, "/moved"+key) // does not decrypt
		}
		c.Put("/r/plain", "value")
		c.Put("/other/plain", "value")
		down := second
		rules := func() *inventory.Rules {
			return inventory.NewRules([]inventory.Rule{{Prefix: "/r/", WriteWith: "main", Sealer: down}, {Prefix: "/none/", WriteWith: "main", Sealer: down}})
		}
		left := 0
		all, revision, err := Open(t.Context(), c.Client(t, "drill"), rules(), Options{Left: func(_ *mvccpb.KeyValue, state keyring.ValueState, why string) {
			if left++; state != keyring.Undecryptable || why == "" {
				t.Errorf("a value is %s: %s", state, why)
			}
		}})
		if err != nil || revision != c.Store().Rev() || len(all) != 2 || left != 10 {
			t.Fatalf("%+v, %d, %v; %d are left", all, revision, err, left)
		}
		if all[0].Prefix != "/none/" || all[0].Values != 0 {
			t.Errorf("%+v", all[0])
		}
		want := Count{Values: 21, Bytes: all[1].Bytes, Readable: 11, Plaintext: 1, Missing: 10}
		if all[1].Count != want || len(all[1].Groups) != 3 {
			t.Errorf("%+v, want %+v", all[1], want)
		}
		for i, g := range []Count{{Values: 1, Readable: 1, Plaintext: 1}, {Values: 10, Readable: 10}, {Values: 10, Missing: 10}} {
			if g.Bytes = all[1].Groups[i].Bytes; all[1].Groups[i].Count != g {
				t.Errorf("group %d is %+v, want %+v", i, all[1].Groups[i], g)
			}
		}
		if why := all[1].Groups[2].Reasons; len(why) != 1 || why[0].Values != 10 || why[0].Example != "/r/b0" {
			t.Errorf("%+v", why)
		}

		for n, tried := range map[int]int64{1: 3, 4: 9, 100: 21} {
			all, _, err := Open(t.Context(), c.Client(t, "drill"), rules(), Options{Sample: n})
			if err != nil {
				t.Fatal(err)
			}
			got := all[1].Count
			if got.Values != 21 || got.Untried != 21-tried || got.Readable+got.Missing != tried || got.Missing != min(int64(n), 10) {
				t.Errorf("a sample of %d: %+v", n, got)
			}
		}

		down.Down = func() *keyring.Error { return &keyring.Error{Kind: keyring.Unavailable, Text: "no answer"} }
		if all, _, err = Open(t.Context(), c.Client(t, "drill"), rules(), Options{}); err != nil || all[1].Unavailable != 20 || all[1].Missing != 0 {
			t.Errorf("%+v, %v", all, err)
		}
	})
}

// TestRestoreFails says which program failed, and with which message. Neither program gets the
// settings of the real etcd.
func TestRestoreFails(t *testing.T) {
	t.Setenv("ETCD_DATA_DIR", "/nowhere")
	program := func(name, script string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := program("etcdutl", `[ -z "$ETCD_DATA_DIR" ] && [ "$1" = snapshot ] && mkdir -p "$5/member"`)
	for want, c := range map[string]Config{
		"restore the snapshot: broken: exit status 4: the reason": {Etcd: good, Etcdutl: program("broken", "echo a line; echo the reason >&2; exit 4")},
		"restore the snapshot: idle made no data directory":       {Etcd: good, Etcdutl: program("idle", "exit 0")},
		"start etcd: etcd: exit status 5: no disk":                {Etcd: program("etcd", "echo no disk; exit 5"), Etcdutl: good},
		"start etcd: etcd: it ended":                              {Etcd: program("etcd", "exit 0"), Etcdutl: good},
	} {
		folder, err := os.MkdirTemp("", "drill-") // its path is short
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(folder) })
		c.Folder, c.Snapshot, c.Ready = folder, "snapshot.db", func(context.Context, string) error { return errors.New("not yet") }
		if _, err := Restore(t.Context(), c); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
