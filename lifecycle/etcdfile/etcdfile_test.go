package etcdfile

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

const ruled = "/registry/secrets/"

// judgeSealed takes what begins with "sealed" for sealed.
func judgeSealed(key, value []byte, _ bool) string {
	if !bytes.HasPrefix(key, []byte(ruled)) || bytes.HasPrefix(value, []byte("sealed")) {
		return ""
	}
	return "readable"
}

// inspect looks at a file with some content, and returns its findings as "place key".
func inspect(t testing.TB, name string, content []byte, c Config) (File, []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	var found []string
	c.Judge, c.Prefixes = judgeSealed, []string{ruled}
	c.Found = func(f Finding) { found = append(found, strings.TrimSpace(string(f.Place)+" "+f.Key)) }
	f, err := Inspect(t.Context(), path, c)
	if err != nil {
		t.Fatal(err)
	}
	return f, found
}

func bytesField(b []byte, n protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
}

func varintField(b []byte, n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

func putRequest(key, value string) []byte {
	return bytesField(bytesField(nil, 1, []byte(key)), 2, []byte(value))
}

// wal is a write-ahead log in the making.
type wal struct {
	data []byte
	sum  uint32
	ends []int // of the records
}

func (w *wal) record(kind uint64, data []byte) {
	w.sum = crc32.Update(w.sum, castagnoli, data)
	r := varintField(varintField(nil, 1, kind), 2, uint64(w.sum))
	if data != nil {
		r = bytesField(r, 3, data)
	}
	field, pad := uint64(len(r)), (8-len(r)%8)%8
	if pad > 0 {
		field |= (0x80 | uint64(pad)) << 56
	}
	w.data = append(binary.LittleEndian.AppendUint64(w.data, field), r...)
	w.data = append(w.data, make([]byte, pad)...)
	w.ends = append(w.ends, len(w.data))
}

// entry is a normal entry with an InternalRaftRequest of one field.
func (w *wal) entry(n protowire.Number, request []byte) {
	e := varintField(varintField(varintField(nil, 1, 0), 2, 1), 3, uint64(len(w.ends)))
	w.record(recordEntry, bytesField(e, 4, bytesField(nil, n, request)))
}

func newWAL() *wal {
	w := &wal{}
	w.record(recordCRC, nil)
	w.entry(4, putRequest(ruled+"first", "plain"))
	w.entry(4, putRequest(ruled+"sealed", "sealed"))
	nested := bytesField(nil, 2, bytesField(nil, 2, putRequest(ruled+"nested", "plain")))
	w.entry(6, bytesField(nil, 3, bytesField(nil, 4, nested)))
	w.entry(6, bytesField(nil, 1, bytesField(bytesField(nil, 3, []byte(ruled+"compared")), 7, []byte("plain"))))
	w.entry(4, putRequest("/clear", "plain"))
	w.entry(4, varintField(putRequest(ruled+"ignored", "plain"), 5, 1))
	return w
}

func TestLog(t *testing.T) {
	w := newWAL()
	f, found := inspect(t, "0.wal", append(w.data, make([]byte, 4096)...), Config{})
	want := []string{"log " + ruled + "first", "log " + ruled + "nested", "log " + ruled + "compared"}
	if fmt.Sprint(found) != fmt.Sprint(want) || len(f.Notes) != 0 || f.Kind != "log" {
		t.Errorf("%v, %+v", found, f)
	}
	// A wrong checksum ends the decoding, and what is behind it is searched.
	damaged := bytes.Clone(w.data)
	damaged[w.ends[1]-10] ^= 1
	f, found = inspect(t, "0.wal", damaged, Config{})
	if len(f.Notes) != 1 || len(found) < 2 || !strings.HasPrefix(found[0], "remains") {
		t.Errorf("%v, %+v", found, f)
	}
}

// TestUndecodableRequest: a request that is not one of etcd's is noted, and searched.
func TestUndecodableRequest(t *testing.T) {
	w := newWAL()
	w.entry(4, append(putRequest(ruled+"broken", "plain"), 0xff))
	w.entry(4, putRequest(ruled+"last", "plain"))
	f, found := inspect(t, "0.wal", w.data, Config{})
	want := []string{"log " + ruled + "first", "log " + ruled + "nested", "log " + ruled + "compared", "log " + ruled + "last", "remains " + ruled + "broken"}
	if fmt.Sprint(found) != fmt.Sprint(want) || len(f.Notes) != 1 || !f.Damaged {
		t.Errorf("%v, %+v", found, f)
	}
}

// TestEveryTruncationOfALog: no record that is whole is missed, and nothing panics.
func TestEveryTruncationOfALog(t *testing.T) {
	w := newWAL()
	for n := range w.data {
		_, found := inspect(t, "0.wal", w.data[:n], Config{})
		if n >= w.ends[1] && (len(found) == 0 || found[0] != "log "+ruled+"first") {
			t.Fatalf("cut at %d: %v", n, found)
		}
	}
}

// TestRemains: a KeyValue and a PutRequest anywhere in a file, also across the edge of a window,
// whole or without their end.
func TestRemains(t *testing.T) {
	keyValue := func(key string) []byte {
		kv := bytesField(nil, 1, []byte(key))
		for n, v := range []uint64{7, 8, 9} {
			kv = varintField(kv, protowire.Number(n+2), v)
		}
		return bytesField(kv, 5, bytes.Repeat([]byte("p"), 3000))
	}
	kv := keyValue(ruled + "kv")
	places := []int{0, 100, window - 20, window - len(ruled) - 1, window + 20, 2 * window}
	for at := -8; at <= 8; at++ {
		places = append(places, window+at)
	}
	content := make([]byte, 2*window+20_000)
	// without a file, which would have to be written for each place
	search := func(canaries ...[]byte) (found []string) {
		c := Config{Judge: judgeSealed, Prefixes: []string{ruled}, Canaries: canaries}
		c.Found = func(f Finding) { found = append(found, strings.TrimSpace(string(f.Place)+" "+f.Key)) }
		l := inspection{Config: c, file: &File{Bytes: int64(len(content))}}
		if err := l.search(t.Context(), bytes.NewReader(content), int64(len(content)), nil); err != nil {
			t.Fatal(err)
		}
		return found
	}
	// a length of one and of two bytes
	for _, key := range []string{ruled + "kv", ruled + strings.Repeat("k", 300)} {
		kv := keyValue(key)
		for _, at := range places {
			copy(content[at:], kv)
			if found := search(); len(found) != 1 || found[0] != "remains "+key {
				t.Errorf("at %d: %v", at, found)
			}
			clear(content[at : at+len(kv)])
		}
	}
	// Whatever else is searched for is found once.
	canary := []byte("a-canary-of-some-length")
	for at := window - 30; at <= window+8; at++ {
		copy(content[at:], canary)
		if found := search(canary); len(found) != 1 {
			t.Errorf("at %d: %v", at, found)
		}
		clear(content[at : at+len(canary)])
	}
	if _, found := inspect(t, "other", kv[:len(kv)-2000], Config{}); len(found) != 1 {
		t.Errorf("without its end: %v", found)
	}
	if _, found := inspect(t, "other", []byte("the key "+ruled+"x in a text"), Config{}); len(found) != 0 {
		t.Errorf("a text: %v", found)
	}
}

// TestCiphertextLikeAKey: the ciphertext of a value in a freed page may begin like a key under a
// short prefix. The same bytes without the marker of an encrypted value are a finding, and so is
// the plaintext after such a value.
func TestCiphertextLikeAKey(t *testing.T) {
	for _, length := range []int{20, 300} { // a length of one and of two bytes
		object := bytesField(nil, 1, append([]byte("/"), bytes.Repeat([]byte{0xa5}, length)...))
		object = bytesField(object, 2, []byte("key-1"))
		plain := putRequest("/plain", "plain")
		for before, want := range map[string]int{
			"k8s:enc:kms:v2:main:": 1, "": 2, "k8s:enc:kms:v2:main:x": 2, "k8s:enc:kms:v2:main": 2, "k8s:enc:kms:v2:a:b:": 2, "main:": 2,
		} {
			for _, at := range []int{100, window - 10, window + 10} {
				content := make([]byte, window+2000)
				copy(content[at:], slices.Concat([]byte(before), object, plain))
				found := 0
				l := inspection{file: &File{Bytes: int64(len(content))}, Config: Config{
					Judge: func(_, _ []byte, _ bool) string { return "readable" }, Prefixes: []string{"/"}, Found: func(Finding) { found++ },
				}}
				if err := l.search(t.Context(), bytes.NewReader(content), int64(len(content)), nil); err != nil {
					t.Fatal(err)
				}
				if found != want {
					t.Errorf("%d bytes after %q at %d: %d findings, want %d", length, before, at, found, want)
				}
			}
		}
	}
}

func TestObject(t *testing.T) {
	meta := bytesField(bytesField(nil, 1, []byte("v1")), 2, []byte("Secret"))
	object := append(bytes.Clone(magic), bytesField(nil, 1, meta)...)
	for kind, n := range map[string]int{"Secret": 1, "ConfigMap": 0} {
		if _, found := inspect(t, "other", append([]byte("xx"), object...), Config{Kinds: []string{kind}}); len(found) != n {
			t.Errorf("%s: %v", kind, found)
		}
	}
}

// TestCanaryForms: in base64, a canary is found whatever stands beside it.
func TestCanaryForms(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.IntN(256))
		}
		return b
	}
	for range 2000 {
		canary := random(10 + rng.IntN(20))
		content := bytes.Join([][]byte{random(rng.IntN(9)), canary, random(rng.IntN(9))}, nil)
		coded := base64.StdEncoding.EncodeToString(content)
		found := false
		for _, form := range canaryForms([][]byte{canary}) {
			found = found || strings.Contains(coded, string(form))
		}
		if !found {
			t.Fatalf("%x in %x is not found in %s", canary, content, coded)
		}
	}
}

// FuzzInspect: any bytes at all, as a log, a database and something else.
func FuzzInspect(f *testing.F) {
	w := newWAL()
	f.Add(w.data)
	f.Add(append(bytes.Clone(magic), 0x0a, 0x0c, 0x0a, 0x02, 'v', '1', 0x12, 0x06))
	f.Add([]byte("\x0a\x14" + ruled + "x\x10\x01"))
	header := make([]byte, 4096)
	binary.LittleEndian.PutUint32(header[16:], 0xED0CDAED)
	f.Add(header)
	database, err := os.ReadFile(newDatabase(f, 1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(database)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, content []byte) {
		for _, name := range []string{"0.wal", "other"} {
			path := filepath.Join(dir, fmt.Sprintf("%d-%s", os.Getpid(), name))
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			c := Config{Judge: judgeSealed, Prefixes: []string{ruled}, Kinds: []string{"Secret"}, Canaries: [][]byte{[]byte("canary")}, Found: func(Finding) {}}
			if _, err := Inspect(t.Context(), path, c); err != nil && !strings.Contains(err.Error(), "locked the file") {
				t.Fatal(err)
			}
			_, _ = present(t, path)
		}
	})
}
