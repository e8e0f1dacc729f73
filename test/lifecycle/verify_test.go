package lifecycle

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
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

// TestVerifyOpens checks that a well-formed value that does not decrypt is a finding, and that a
// value whose KMS cannot be asked does not count as encrypted.
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
		return s.verify(t, code, flags+" --snapshot "+s.etcd.Snapshot("snap/saved.db"))
	}
	both(0, "")
	for _, keyID := range []string{"1", "999"} { // one socket that exists, and one that does not
		put(t, s.raw, prefix+"forged", forged(t, "dev", keyID))
		if _, places := both(1, ""); !places["snap live "+prefix+"forged"] {
			t.Errorf("key ID %s: %v", keyID, places)
		}
	}
	if _, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(prefix + "forged")}); err != nil {
		t.Fatal(err)
	}
	s.verify(t, 1, "") // the history
	s.run(t, 1, "purge --yes", "2 old values that were not decrypted removed")
	both(0, "")

	kms.Disable(true)
	if _, places := both(1, ""); !places["snap live /registry/configmaps/sealed"] || places["snap live "+prefix+"sealed"] {
		t.Errorf("a disabled key: %v", places)
	}
	kms.Disable(false)
	kms.Stop()
	if v, _ := both(3, "--timeout 1s"); v.Undecrypted == 0 {
		t.Error("none counts as undecrypted")
	}
	s.run(t, 3, "verify --timeout 1s", "1 value could not be decrypted", "whether 1 well-formed value can be decrypted")
	s.run(t, 0, "verify --offline --snapshot "+s.etcd.Snapshot("snap/saved.db"), "whether encrypted values can be decrypted, since --offline calls no KMS")
	kms.Start()
}

// TestVerifyBadFiles checks that damaged files, and files that are not etcd's, are searched
// nevertheless, and never reported as clean.
func TestVerifyBadFiles(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", nil)
	put(t, s.kv, prefix+"sealed", "v")
	db, err := os.ReadFile(s.etcd.Snapshot("snap/saved.db"))
	if err != nil {
		t.Fatal(err)
	}
	s.run(t, 0, "verify --snapshot "+s.File("good.db", db))
	changed := bytes.Clone(db)
	changed[len(changed)-sha256.Size-1] ^= 1
	for name, content := range map[string][]byte{
		"half.db": db[:len(db)/2], "12KiB.db": db[:12<<10], "empty.db": {}, "changed.db": changed, "begins-with-nothing.db": append(make([]byte, 4096), db[4096:]...),
		"packed.db.gz": gzipped(t, db), "text": []byte("some other text"), "empty.wal": {}, "zeros.wal": make([]byte, 4096),
	} {
		file := s.File(name, content)
		v, _ := s.verify(t, 3, "--snapshot "+file+" --canary "+mark)
		if !strings.Contains(strings.Join(v.NotChecked, "; "), "what could not be decoded of "+file) {
			t.Errorf("%s: not checked: %v", name, v.NotChecked)
		}
		if !strings.HasSuffix(name, ".wal") {
			s.run(t, 3, "decrypt --yes --snapshot "+file+" "+prefix+"none")
		}
	}
	s.run(t, 3, "verify --snapshot "+s.proxy.ConfigFile, "neither a database nor a write-ahead log")
	s.run(t, 1, "verify --snapshot "+s.File("text", []byte("some "+mark+" text"))+" --canary "+mark, "canary byte 5")
	s.run(t, 3, "verify --snapshot "+filepath.Join(s.Dir, "none"), "no such file")
	s.run(t, 3, "verify --snapshot "+s.Dir, "is not a regular file")
	for _, flag := range []string{"--offline", "--canary a", "--canary-file a", "--kind Secret"} {
		s.run(t, 2, "verify "+flag, "--snapshot or --data-dir")
	}
	s.run(t, 2, "verify --wal-dir a --snapshot b", "--data-dir")
	s.run(t, 2, "verify --snapshot a --data-dir b")
}

// TestVerifyCompressed checks that snapshots in a data directory are searched if they can be
// decompressed, and named otherwise.
func TestVerifyCompressed(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", nil)
	put(t, s.kv, prefix+"a", mark+"-a")
	clean, err := os.ReadFile(s.etcd.Snapshot("clean.db"))
	if err != nil {
		t.Fatal(err)
	}
	plain := s.StartEtcd(harness.EtcdConfig{Version: "3.7"})
	put(t, pb.NewKVClient(harness.Dial(t, plain.Address, nil)), prefix+"b", mark+"-b")
	dirty, err := os.ReadFile(plain.Snapshot("dirty.db"))
	if err != nil {
		t.Fatal(err)
	}
	s.etcd.Kill()
	s.run(t, 0, "verify --data-dir "+s.etcd.DataDir)
	for name, c := range map[string]struct {
		content []byte
		code    int
		prints  []string
	}{
		"clean.db.gz":  {gzipped(t, clean), 0, []string{"it is compressed (gzip): its content was searched"}},
		"clean.db.zip": {zipped(t, clean), 0, []string{"it is compressed (zip): its content was searched"}},
		"dirty.db.gz":  {gzipped(t, dirty), 1, []string{"dirty.db.gz decompressed: 1 finding", `remains "` + prefix + `b"`}},
		"dirty.db.zip": {zipped(t, dirty), 1, []string{`dirty.db.zip entry "etcd.db": 1 finding`, `remains "` + prefix + `b"`}},
		"dirty.db.zst": {[]byte("\x28\xb5\x2f\xfd and so on"), 3, []string{"what could not be decoded of dirty.db.zst: it is compressed (zstd)"}},
		"dirty.db.xz":  {[]byte("\xfd7zXZ\x00 and so on"), 3, []string{"what could not be decoded of dirty.db.xz: it is compressed (xz)"}},
		"cut.db.gz":    {gzipped(t, clean)[:1000], 3, []string{"what could not be decoded of cut.db.gz"}},
	} {
		path := filepath.Join(s.etcd.DataDir, "member", "snap", name)
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		for i, p := range c.prints {
			c.prints[i] = strings.Replace(p, "of "+name, "of member/snap/"+name, 1)
		}
		s.run(t, c.code, "verify --data-dir "+s.etcd.DataDir, c.prints...)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func gzipped(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(content)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	entry, err := w.Create("etcd.db")
	if err == nil {
		_, err = entry.Write(content)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestVerifyMovedLog checks that a write-ahead log on another disk, behind a link or with
// --wal-dir, is searched. A directory that is not a member's is refused.
func TestVerifyMovedLog(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", nil)
	put(t, s.raw, prefix+"a", mark+"-a")
	s.run(t, 0, "reencrypt")
	s.run(t, 1, "purge --yes")
	s.etcd.Kill()
	dir := s.etcd.DataDir
	wal, away := filepath.Join(dir, "member", "wal"), filepath.Join(s.Dir, "moved")
	if err := os.Rename(wal, away); err != nil {
		t.Fatal(err)
	}
	s.run(t, 3, "verify --data-dir "+dir, "holds no write-ahead log", "--wal-dir")
	_, places := s.verify(t, 1, "--data-dir "+dir+" --wal-dir "+away)
	needs(t, places, "moved log "+prefix+"a")
	link := func(to, at string) {
		t.Helper()
		if err := os.Symlink(to, at); err != nil {
			t.Fatal(err)
		}
	}
	link(away, wal)
	_, places = s.verify(t, 1, "--data-dir "+dir)
	needs(t, places, "wal log "+prefix+"a")
	link(dir, filepath.Join(s.Dir, "link"))
	_, places = s.verify(t, 1, "--data-dir "+filepath.Join(s.Dir, "link"))
	needs(t, places, "wal log "+prefix+"a")
	s.run(t, 3, "verify --data-dir "+s.Dir, "is not the data directory of a member")
	s.run(t, 3, "verify --data-dir "+filepath.Join(dir, "member"), "is not the data directory of a member")
	link(dir, filepath.Join(dir, "circle"))
	s.run(t, 3, "verify --data-dir "+dir, "is a symbolic link to a directory that contains it")
	if err := os.Remove(filepath.Join(dir, "circle")); err != nil {
		t.Fatal(err)
	}
	link(filepath.Join(s.Dir, "none"), filepath.Join(dir, "dangling"))
	s.run(t, 3, "verify --data-dir "+dir, "no such file")
}

// TestVerifyObjects checks that an object of a kind that is under a rule is found in any place, and
// that verify says so if it knows no kind.
func TestVerifyObjects(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", func(c *harness.ProxyConfig) {
		for _, p := range []string{"/registry/pods/", "/registry/example.com/widgets/"} {
			c.Rules = append(c.Rules, harness.Rule{Prefix: p, WriteWith: "dev"})
		}
	})
	object := func(kind string) string {
		meta := "\n\x02v1\x12" + string(rune(len(kind))) + kind
		return "k8s\x00\n" + string(rune(len(meta))) + meta
	}
	put(t, s.raw, "/other/node", object("Node"))
	v, _ := s.verify(t, 0, "--snapshot "+s.etcd.Snapshot("snap/saved.db"))
	if told := strings.Join(v.NotChecked, "; "); !strings.Contains(told, `objects below "/registry/example.com/widgets/"`) || strings.Contains(told, "/pods/") {
		t.Errorf("not checked: %s", told)
	}
	put(t, s.raw, "/other/pod", object("Pod"))
	_, places := s.verify(t, 1, "--snapshot "+s.etcd.Snapshot("snap/saved.db"))
	needs(t, places, "snap object Pod")
	v, _ = s.verify(t, 0, "--kind Secret --snapshot "+s.etcd.Snapshot("snap/saved.db"))
	if told := strings.Join(v.NotChecked, "; "); !strings.Contains(told, `objects below "/registry/pods/"`) {
		t.Errorf("not checked: %s", told)
	}
}
