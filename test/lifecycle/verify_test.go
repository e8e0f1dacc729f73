package lifecycle

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// forged is readable text in a well-formed envelope.
func forged(t *testing.T, provider, keyID string) string {
	t.Helper()
	marker, err := envelope.Marker(provider)
	if err != nil {
		t.Fatal(err)
	}
	o := envelope.Object{Header: envelope.Header{Type: envelope.TypeSeed, KeyID: keyID, Source: []byte("junk")}, Data: []byte(mark + "-forged")}
	value, err := o.Append([]byte(marker))
	if err != nil {
		t.Fatal(err)
	}
	return string(value)
}

// TestVerifyOpens: what is well-formed and does not open is a finding, and what no KMS can be asked about is not taken for sealed.
func TestVerifyOpens(t *testing.T) {
	t.Parallel()
	var kms *harness.KMS
	s := newSite(t, "3.7", func(c *harness.ProxyConfig) {
		kms = harness.New(t).NewKMS("plugin")
		kms.Start()
		c.KMS = append(c.KMS, kms.Config("plugin"))
		c.Rules = append(c.Rules, harness.Rule{Prefix: "/registry/configmaps/", WriteWith: "plugin"})
	})
	put(t, s.kv, prefix+"sealed", "v")
	put(t, s.kv, "/registry/configmaps/sealed", "v")
	both := func(code int, flags string) (v verified, places map[string]bool) {
		t.Helper()
		s.verify(t, code, flags)
		return s.verify(t, code, flags+" --snapshot "+s.snapshot(t))
	}
	both(0, "")
	for _, keyID := range []string{"1", "999"} { // one that is there, one that is not
		put(t, s.raw, prefix+"forged", forged(t, "dev", keyID))
		if _, places := both(1, ""); !places["snap live "+prefix+"forged"] {
			t.Errorf("key ID %s: %v", keyID, places)
		}
	}
	if _, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(prefix + "forged")}); err != nil {
		t.Fatal(err)
	}
	s.verify(t, 1, "") // the history
	s.run(t, 1, "purge --yes", "2 old plaintext values dropped")
	both(0, "")

	kms.Disable(true)
	if _, places := both(1, ""); !places["snap live /registry/configmaps/sealed"] || places["snap live "+prefix+"sealed"] {
		t.Errorf("a disabled key: %v", places)
	}
	kms.Disable(false)
	kms.Stop()
	if v, _ := both(3, "--timeout 1s"); v.Unopened == 0 {
		t.Error("none is unopened")
	}
	s.run(t, 3, "verify --timeout 1s", "1 values could not be opened", "whether 1 values that are well-formed open")
	s.run(t, 0, "verify --offline --snapshot "+s.snapshot(t), "whether sealed values open, since --offline asks no KMS")
	kms.Start()
}

// snapshot saves etcd's database, as etcdctl does.
func (s *site) snapshot(t *testing.T) string {
	t.Helper()
	stream, err := pb.NewMaintenanceClient(harness.Dial(t, s.etcd.Address, nil)).Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, r.Blob...)
	}
	if err := os.MkdirAll(filepath.Join(s.Dir, "snap"), 0o700); err != nil {
		t.Fatal(err)
	}
	return s.File("snap/saved.db", data)
}
