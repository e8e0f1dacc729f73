package etcdfile

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// storedValue is an mvccpb.KeyValue, as pages of a database hold it.
func storedValue(key, value string) []byte {
	kv := bytesField(nil, 1, []byte(key))
	for n, v := range []uint64{5, 6, 7} {
		kv = varintField(kv, protowire.Number(n+2), v)
	}
	return bytesField(kv, 5, []byte(value))
}

func gzipped(t testing.TB, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t testing.TB, header zip.FileHeader, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	if _, err := w.Create("folder/"); err != nil {
		t.Fatal(err)
	}
	f, err := w.CreateHeader(&header)
	if err == nil {
		_, err = f.Write(content)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestCompressed: values in compressed files are found, and files that cannot be searched are
// noted.
func TestCompressed(t *testing.T) {
	content := slices.Concat(make([]byte, 5000), storedValue(ruled+"a", "plaintext"), make([]byte, window), storedValue(ruled+"b", "sealed"), storedValue(ruled+"c", "plaintext"))
	small := storedValue(ruled+"a", "plaintext")
	deflated := zipped(t, zip.FileHeader{Name: "etcd.db", Method: zip.Deflate}, content)
	both := []string{"remains " + ruled + "a", "remains " + ruled + "c"}
	one := both[:1]
	// Made by bzip2 of small.
	bzipped, err := base64.StdEncoding.DecodeString("QlpoOTFBWSZTWU/bPfEAAAJxgAOwSEBAEKqlXGAgADFBo0aDIDQigwxPUCaemkZmjBZmjB7azHZD0a236sZeQdxQhwXckU4UJBP2z3xA")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		name    string
		content []byte
		kind    string
		found   []string
		damage  string // "" for none
	}{
		"gzip":                   {"a.db.gz", gzipped(t, content), "gzip", both, ""},
		"gzip, another name":     {"backup", gzipped(t, content), "gzip", both, ""},
		"gzip twice":             {"a.gz", gzipped(t, gzipped(t, content)), "gzip", both, ""},
		"gzip four times":        {"a.gz", gzipped(t, gzipped(t, gzipped(t, gzipped(t, content)))), "gzip", nil, "compressed more than 3 times"},
		"gzip of two members":    {"a.gz", append(gzipped(t, content), gzipped(t, small)...), "gzip", append(slices.Clone(both), one...), ""},
		"gzip of zip":            {"a.gz", gzipped(t, deflated), "gzip", nil, "decompressed is compressed (zip): its content was not searched"},
		"gzip, cut":              {"a.gz", gzipped(t, content)[:len(gzipped(t, content))-20], "gzip", one, "cannot be decompressed to its end"},
		"gzip, something behind": {"a.gz", append(gzipped(t, small), "more"...), "gzip", one, "cannot be decompressed to its end"},
		"gzip, empty":            {"a.gz", gzipped(t, nil), "gzip", nil, ""},
		"gzip, no gzip":          {"a.gz", []byte("text"), "other", nil, "it is named like a compressed file (gzip)"},
		"gzip, header alone":     {"a.gz", gzipped(t, content)[:2], "gzip", nil, "cannot be decompressed: "},
		"zip":                    {"a.zip", deflated, "zip", both, ""},
		"zip of gzip":            {"a.zip", zipped(t, zip.FileHeader{Name: "a.gz", Method: zip.Deflate}, gzipped(t, content)), "zip", both, ""},
		"zip, unknown method":    {"a.zip", bytes.ReplaceAll(deflated, []byte("\x08\x00\x08\x00"), []byte("\x08\x00\x5d\x00")), "zip", nil, `entry "etcd.db" cannot be read`},
		"zip, encrypted":         {"a.zip", bytes.ReplaceAll(deflated, []byte("\x08\x00\x08\x00"), []byte("\x09\x00\x08\x00")), "zip", nil, `entry "etcd.db" is encrypted`},
		"zip, cut":               {"a.zip", deflated[:len(deflated)/2], "zip", nil, "cannot be read"},
		"bzip2":                  {"a.bz2", bzipped, "bzip2", one, ""},
		"zstd":                   {"a.zst", []byte("\x28\xb5\x2f\xfdxyz"), "zstd", nil, "it is compressed (zstd): its content was not searched"},
		"xz":                     {"a.xz", []byte("\xfd7zXZ\x00xyz"), "xz", nil, "it is compressed (xz): its content was not searched"},
		"lz4":                    {"a.lz4", []byte("\x04\x22\x4d\x18xyz"), "lz4", nil, "was not searched"},
		"xz, empty":              {"a.xz", nil, "other", nil, "it is named like a compressed file (xz)"},
		"a text":                 {"a.txt", []byte("text"), "other", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			f, found := inspect(t, c.name, c.content, Config{})
			if f.Kind != c.kind || !slices.Equal(found, c.found) {
				t.Errorf("%s, %q, want %s, %q", f.Kind, found, c.kind, c.found)
			}
			if notes := strings.Join(f.Notes, "; "); f.Damaged != (c.damage != "") || !strings.Contains(notes, c.damage) {
				t.Errorf("damaged: %t, %s; want %q", f.Damaged, notes, c.damage)
			} else if slices.Contains([]string{"zstd", "xz", "lz4"}, f.Kind) && strings.Contains(notes, "was searched") {
				t.Errorf("it was not searched, and the notes say that it was: %s", notes)
			}
		})
	}
}

// TestCompressedPlace: a finding says what of a file it is in.
func TestCompressedPlace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.zip")
	if err := os.WriteFile(path, zipped(t, zip.FileHeader{Name: "x\ny", Method: zip.Store}, gzipped(t, []byte("0123canary"))), 0o600); err != nil {
		t.Fatal(err)
	}
	var all []Finding
	if _, err := Inspect(t.Context(), path, Config{Canaries: [][]byte{[]byte("canary")}, Found: func(f Finding) { all = append(all, f) }}); err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || all[0].File != path+` entry "x\ny" decompressed` || all[0].Offset != 4 {
		t.Errorf("%+v", all)
	}
}

// TestCompressedEveryKey: a rule for every key has no prefix to search for, so that a compressed
// database is not searched for it.
func TestCompressedEveryKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.gz")
	if err := os.WriteFile(path, gzipped(t, storedValue("a", "b")), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Inspect(t.Context(), path, Config{Prefixes: []string{""}, Judge: judgeSealed})
	if err != nil || !f.Damaged || !strings.Contains(strings.Join(f.Notes, ""), "--snapshot") {
		t.Errorf("%+v, %v", f, err)
	}
}

// TestCompressedMemory: what a small file decompresses to is searched piece by piece, whatever its
// size.
func TestCompressedMemory(t *testing.T) {
	const size = 96 << 20
	path := filepath.Join(t.TempDir(), "a.gz")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err == nil {
		_, err = io.CopyN(w, zeros{}, size)
	}
	if err == nil {
		_, err = w.Write(storedValue(ruled+"last", "plaintext"))
	}
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	found := 0
	if _, err := Inspect(t.Context(), path, Config{Prefixes: []string{ruled}, Judge: judgeSealed, Found: func(Finding) { found++ }}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
		t.Errorf("%d bytes were allocated", used)
	}
	if found != 1 {
		t.Errorf("%d findings", found)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
