package auditlog

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var testKey = []byte("0123456789abcdef0123456789abcdef")

// open opens the log at path until the test ends.
func open(t testing.TB, cfg Config) *Log {
	t.Helper()
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// sample is a log of n records, closed, and its path.
func sample(t testing.TB, n int, key []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path, Key: key})
	for i := range n {
		l.Record(call(i))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// call is a record that differs from those of other numbers.
func call(i int) Record {
	return Record{Event: EventKMS, Time: time.Unix(int64(i), 0), Provider: "dev", Operation: "Decrypt", KeyID: "k/1", RequestID: fmt.Sprint("r", i), Class: "ok"}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func overwrite(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// verify checks files that must be readable.
func verify(t testing.TB, key []byte, paths ...string) *Report {
	t.Helper()
	r, err := VerifyFiles(VerifyOptions{Key: key}, paths...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// good checks that files have no findings and n records.
func good(t testing.TB, n int, key []byte, paths ...string) *Report {
	t.Helper()
	r := verify(t, key, paths...)
	if !r.OK || len(r.Findings) > 0 || r.Records != n {
		t.Fatalf("%d records, want %d; findings %+v, notes %+v", r.Records, n, r.Findings, r.Notes)
	}
	return r
}

// TestGolden fixes the bytes of a log. The hashes were computed by another program, from the
// description in the package's comment.
func TestGolden(t *testing.T) {
	for name, key := range map[string][]byte{"plain": nil, "keyed": testKey} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a")
			l := open(t, Config{Path: path, Key: key})
			at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.FixedZone("", 3600))
			l.Record(Record{Event: EventStart, Time: at, Version: "v1", Config: "00ff"})
			l.Record(Record{
				Event: EventKMS, Time: at, Provider: "ack", Operation: "GenerateDataKey", KeyID: "key-1/v-2", RequestID: "req", Class: "ok", Latency: 1500 * time.Microsecond,
			})
			l.Record(Record{Event: EventKMS, Time: at, Provider: "ack", Operation: "Status", Class: "unavailable"})
			l.Record(Record{Event: EventDenied, Time: at, Listener: "127.0.0.1:1", Client: "m\"<allory>\n", Remote: "127.0.0.1:2"})
			l.Record(Record{Event: EventReload, Time: at, Trigger: "SIGHUP", Outcome: "refused", Reason: "less"})
			l.Record(Record{Event: EventRecovery, Time: at, Provider: "dr", Primary: "ack", KeyID: "k"})
			l.Record(Record{Event: EventStop, Time: at, Outcome: "ok"})
			golden := filepath.Join("testdata", name+".jsonl")
			if got, want := read(t, path), read(t, golden); !bytes.Equal(got, want) {
				t.Errorf("the bytes have changed, and with them what older versions wrote. got:\n%s\nwant:\n%s", got, want)
			}
			good(t, 7, key, golden)
		})
	}
}

// TestChainByHand computes a chain as the documentation says it, without any of the package's code.
func TestChainByHand(t *testing.T) {
	for _, key := range [][]byte{nil, testKey} {
		previous := make([]byte, 32)
		for i, text := range bytes.Split(bytes.TrimSpace(read(t, sample(t, 5, key))), []byte("\n")) {
			body, rest, ok := bytes.Cut(text, []byte(`,"hash":"`))
			if !ok {
				t.Fatal("no hash")
			}
			h := sha256.New()
			if key != nil {
				h = hmac.New(sha256.New, key)
			}
			h.Write(previous)
			h.Write(body)
			previous = h.Sum(nil)
			if want := hex.EncodeToString(previous) + `"}`; string(rest) != want {
				t.Fatalf("line %d ends with %s, want %s", i+1, rest, want)
			}
			var record map[string]any
			if err := json.Unmarshal(text, &record); err != nil || record["seq"] != float64(i+1) {
				t.Errorf("%v: %s", err, text)
			}
		}
	}
}

func TestContinuesAfterRestart(t *testing.T) {
	path := sample(t, 3, testKey)
	for i := range 3 {
		l := open(t, Config{Path: path, Key: testKey})
		l.Record(call(3 + i))
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r := good(t, 6, testKey, path)
	if r.LastSeq != 6 || r.FirstSeq != 1 || len(r.Notes) > 0 {
		t.Errorf("report = %+v", r)
	}
}

// TestTornLine cuts the last line at every length, as a crash may, and goes on.
func TestTornLine(t *testing.T) {
	path := sample(t, 3, nil)
	whole := read(t, path)
	start := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for cut := start + 1; cut < len(whole); cut++ {
		overwrite(t, path, whole[:cut])
		r := verify(t, nil, path)
		if r.OK || len(r.Findings) != 1 || r.Findings[0].Kind != KindTorn || r.Findings[0].Line != 3 {
			t.Fatalf("cut at %d: %+v", cut, r.Findings)
		}
		l := open(t, Config{Path: path})
		l.Record(call(9))
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		r = good(t, 4, nil, path) // two of before, the one that says torn, the new one
		if cut == len(whole)-1 {
			// only the line break was missing: the four are three of before and the new one
			continue
		}
		if len(r.Notes) != 1 || r.Notes[0].Kind != KindTorn || r.Notes[0].Line != 3 {
			t.Fatalf("cut at %d: notes %+v", cut, r.Notes)
		}
		// The piece is covered by the chain, too.
		data := read(t, path)
		data[start] ^= 1
		overwrite(t, path, data)
		if verify(t, nil, path).OK {
			t.Fatal("a change of the torn piece is not found")
		}
	}
}

// TestTornFirstLine: a crash in the very first record.
func TestTornFirstLine(t *testing.T) {
	path := sample(t, 1, nil)
	whole := read(t, path)
	for cut := 1; cut < len(whole); cut++ {
		overwrite(t, path, whole[:cut])
		l := open(t, Config{Path: path})
		l.Record(call(1))
		_ = l.Close()
		good(t, 2, nil, path)
	}
}

// TestDamagedEnd: whole lines at the end are garbage, as after a loss of power. The log goes on,
// and its check says so.
func TestDamagedEnd(t *testing.T) {
	path := sample(t, 3, nil)
	data := append(read(t, path), []byte("\x00\x00\n\x00\n")...)
	overwrite(t, path, data)
	l := open(t, Config{Path: path})
	l.Record(call(3))
	_ = l.Close()
	r := verify(t, nil, path)
	if len(r.Findings) != 1 || r.Findings[0].Kind != KindDamaged || r.Findings[0].Line != 4 || r.Records != 5 {
		t.Errorf("report = %+v", r)
	}
}

// TestRecordsAreBounded: whatever a client or a KMS is called, a record stays readable.
func TestRecordsAreBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	l := open(t, Config{Path: path})
	long := strings.Repeat("\x01ä\xff\u2028\n", 100_000)
	l.Record(Record{
		Event: Event("denied"), Provider: long, Primary: long, Operation: long, KeyID: long, RequestID: long, Class: long,
		Listener: long, Client: long, Remote: long, Trigger: long, Outcome: long, Reason: long, Version: long, Config: long,
	})
	l.Record(call(1))
	_ = l.Close()
	good(t, 2, nil, path)
	l = open(t, Config{Path: path})
	l.Record(call(2))
	_ = l.Close()
	good(t, 3, nil, path)
}

func TestModeAndClose(t *testing.T) {
	path := sample(t, 1, nil)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want 0600", info.Mode(), err)
	}
	l := open(t, Config{Path: path})
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	l.Record(call(1))
	if l.Lost() != 1 || l.Check() == nil {
		t.Errorf("after Close: %d lost, %v", l.Lost(), l.Check())
	}
	var none *Log
	none.Record(call(1))
	if none.Check() != nil || none.Lost() != 0 || none.Close() != nil {
		t.Error("a nil log is not well")
	}
}

// TestKeyBytes: an etcd key that is not UTF-8 has its bytes beside the text, which JSON changes;
// and no other key has.
func TestKeyBytes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path})
	for _, key := range []string{"/text/größe", "/bytes/\xff\x00\xfe", strings.Repeat("\xff", 2*maxText)} {
		l.Record(Record{Event: EventCommand, Command: "decrypt", Key: key})
	}
	var records []Record
	for line := range bytes.Lines(read(t, path)) {
		var r Record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	if len(records) != 3 || records[0].KeyBytes != nil || string(records[1].KeyBytes) != "/bytes/\xff\x00\xfe" || len(records[2].KeyBytes) != maxText {
		t.Errorf("%+v", records)
	}
}
