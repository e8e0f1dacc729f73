package auditlog

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// check verifies the text of one file.
func check(t testing.TB, key, text []byte) *Report {
	t.Helper()
	r, err := Verify(VerifyOptions{Key: key}, Input{Name: "a", Reader: bytes.NewReader(text)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestEveryBit: each change of a single bit anywhere in a log is found.
func TestEveryBit(t *testing.T) {
	for name, key := range map[string][]byte{"plain": nil, "keyed": testKey} {
		t.Run(name, func(t *testing.T) {
			text := read(t, filepath.Join("testdata", name+".jsonl"))
			if !check(t, key, text).OK {
				t.Fatal("the log is not good to begin with")
			}
			for i := range text {
				for bit := range 8 {
					text[i] ^= 1 << bit
					if r, err := Verify(VerifyOptions{Key: key}, Input{"a", bytes.NewReader(text)}); err == nil && r.OK {
						t.Errorf("bit %d of byte %d (%q) is not found", bit, i, text[i])
					}
					text[i] ^= 1 << bit
				}
			}
		})
	}
}

// TestEveryBitOfAFileThatFollows does the same for a file that begins in the middle of its chain,
// where its first record names the hash before.
func TestEveryBitOfAFileThatFollows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	l := open(t, Config{Path: path, MaxSize: 1000})
	for i := range 5 {
		l.Record(call(i))
	}
	_ = l.Close()
	older, err := rotated(path)
	if err != nil || len(older) != 1 {
		t.Fatalf("%q, %v", older, err)
	}
	before, text := read(t, older[0]), read(t, path)
	for _, alone := range []bool{true, false} {
		for i := range text {
			text[i] ^= 0x20
			files := []Input{{"before", bytes.NewReader(before)}, {"a", bytes.NewReader(text)}}
			if alone {
				files = files[1:]
			}
			if r, err := Verify(VerifyOptions{}, files...); err == nil && r.OK {
				t.Errorf("alone %v: byte %d (%q) is not found", alone, i, text[i])
			}
			text[i] ^= 0x20
		}
	}
}

// TestLines drops, repeats, inserts and swaps lines. Each finding is about the line that it names.
func TestLines(t *testing.T) {
	text := read(t, sample(t, 8, testKey))
	foreign := read(t, sample(t, 8, bytes.Repeat([]byte{2}, 32)))
	lines := func() [][]byte { return bytes.SplitAfter(bytes.TrimSuffix(text, []byte("\n")), []byte("\n")) }
	insert := func(at int, line string) [][]byte { return slices.Insert(lines(), at, []byte(line)) }
	other := bytes.SplitAfter(foreign, []byte("\n"))
	altered := lines()
	altered[3] = bytes.Replace(altered[3], []byte(`"ok"`), []byte(`"no"`), 1)
	replaced := lines()
	replaced[3] = other[3]
	swapped := lines()
	swapped[2], swapped[3] = swapped[3], swapped[2]
	for name, tt := range map[string]struct {
		lines [][]byte
		want  []string // line and kind
	}{
		"dropped":         {slices.Delete(lines(), 3, 4), []string{"4 missing"}},
		"two dropped":     {slices.Delete(lines(), 3, 5), []string{"4 missing"}},
		"first dropped":   {lines()[1:], []string{"1 missing"}},
		"repeated":        {insert(4, string(lines()[3])), []string{"5 misplaced"}},
		"repeated later":  {insert(6, string(lines()[0])), []string{"7 misplaced"}},
		"swapped":         {swapped, []string{"3 missing", "4 misplaced"}},
		"altered":         {altered, []string{"4 altered"}},
		"other log":       {replaced, []string{"4 key", "4 altered", "5 altered"}},
		"foreign line":    {insert(2, "hello\n"), []string{"3 foreign"}},
		"empty line":      {insert(2, "\n"), []string{"3 foreign"}},
		"two foreign":     {insert(2, "a\nb\n"), []string{"3 foreign"}},
		"foreign at end":  {insert(8, "\nx\n"), []string{"9 foreign"}},
		"very long line":  {insert(2, strings.Repeat("x", 3*maxLine)+"\n"), []string{"3 foreign"}},
		"torn in between": {insert(2, `{"seq":3,"ti`+"\n"), []string{"3 foreign"}},
	} {
		t.Run(name, func(t *testing.T) {
			joined := append(bytes.Join(tt.lines, nil), '\n')
			joined = append(bytes.TrimRight(joined, "\n"), '\n')
			if name == "foreign at end" {
				joined = append(slices.Clone(text), "x\n"...)
			}
			var got []string
			for _, f := range check(t, testKey, joined).Findings {
				got = append(got, fmt.Sprint(f.Line, " ", f.Kind))
				if f.Text == "" || f.File != "a" {
					t.Errorf("finding %+v", f)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("findings %q, want %q", got, tt.want)
			}
		})
	}
}

// TestRewrittenWithoutKey: who has no key cannot make a chain that passes, keyed or not.
func TestRewrittenWithoutKey(t *testing.T) {
	text := read(t, sample(t, 3, nil))
	if r := check(t, testKey, text); r.OK || r.Findings[0].Kind != KindKey {
		t.Errorf("a chain without a key passes with one: %+v", r.Findings)
	}
	if r := check(t, bytes.Repeat([]byte{3}, 32), read(t, sample(t, 3, testKey))); r.OK || r.Findings[0].Kind != KindKey {
		t.Errorf("a chain of another key passes: %+v", r.Findings)
	}
}

func TestKeyedNeedsKey(t *testing.T) {
	path := sample(t, 3, testKey)
	if _, err := VerifyFiles(VerifyOptions{}, path); !errors.Is(err, ErrKeyed) {
		t.Errorf("err = %v, want ErrKeyed", err)
	}
	if _, err := VerifyFiles(VerifyOptions{Key: []byte("short")}, path); err == nil || errors.Is(err, ErrKeyed) {
		t.Errorf("a short key: %v", err)
	}
	// A keyed record in a chain without a key is no reason to stop.
	text := append(read(t, sample(t, 3, nil)), bytes.SplitAfter(read(t, path), []byte("\n"))[2]...)
	if r := check(t, nil, text); r.OK {
		t.Error("a keyed record in a chain without a key passes")
	}
}

func TestExpectLast(t *testing.T) {
	path := sample(t, 4, nil)
	whole := read(t, path)
	last := check(t, nil, whole).LastHash
	for name, tt := range map[string]struct {
		text  []byte
		hash  string
		since int // -1: not there
	}{
		"there":     {whole, last, 0},
		"truncated": {whole[:bytes.LastIndexByte(whole[:len(whole)-1], '\n')+1], last, -1},
		"grown":     {whole, string(whole[bytes.IndexByte(whole, '\n')-66 : bytes.IndexByte(whole, '\n')-2]), 3},
		"unknown":   {whole, fmt.Sprintf("%x", sha256.Sum256(nil)), -1},
	} {
		r, err := Verify(VerifyOptions{ExpectLast: tt.hash}, Input{"a", bytes.NewReader(tt.text)})
		switch {
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case tt.since < 0 && (r.OK || r.Since != nil || r.Findings[0].Kind != KindEnd), tt.since >= 0 && (!r.OK || r.Since == nil || *r.Since != tt.since):
			t.Errorf("%s: %+v", name, r)
		}
	}
	// Truncation alone leaves no trace, as documented.
	if !check(t, nil, whole[:bytes.LastIndexByte(whole[:len(whole)-1], '\n')+1]).OK {
		t.Error("a shorter chain is not one")
	}
	for _, bad := range []string{"x", strings.ToUpper(last), last[1:]} {
		if _, err := Verify(VerifyOptions{ExpectLast: bad}); err == nil {
			t.Errorf("%q is taken for a hash", bad)
		}
	}
}

func TestEmptyAndUnreadable(t *testing.T) {
	if r := check(t, nil, nil); r.OK || r.Findings[0].Kind != KindEmpty {
		t.Errorf("empty: %+v", r.Findings)
	}
	for _, path := range []string{t.TempDir(), "testdata/none"} {
		if _, err := VerifyFiles(VerifyOptions{}, path); err == nil {
			t.Errorf("%s could be verified", path)
		}
	}
	// More findings than anyone reads are counted.
	if r := check(t, nil, bytes.Repeat(append(bytes.Clone(line([]byte(`{"seq":5`), sum{})), "x\n"...), 1500)); len(r.Findings) != maxFindings || r.More == 0 {
		t.Errorf("%d findings, %d more", len(r.Findings), r.More)
	}
}

// TestNothingControlsTheTerminal: what a stranger has written into a log is not printed as it is.
func TestNothingControlsTheTerminal(t *testing.T) {
	const evil = `\u001b]0;owned\u0007\u009b31m`
	body := `{"seq":1,"time":"","event":"lost","lost":1,"since":"` + evil + `","chainKey":"` + evil + `"`
	text := line([]byte(body), chain{}.next(sum{}, []byte(body)))
	key := testKey
	r := check(t, key, text)
	for _, f := range append(r.Findings, r.Notes...) {
		if strings.ContainsFunc(f.Text, func(c rune) bool { return c < ' ' || c >= 0x7f && c < 0xa0 }) {
			t.Errorf("%q", f.Text)
		}
	}
	if len(r.Findings) == 0 || len(r.Notes) == 0 {
		t.Errorf("%+v", r)
	}
	if _, err := Verify(VerifyOptions{}, Input{"a", bytes.NewReader(text)}); !errors.Is(err, ErrKeyed) || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("%q", err)
	}
}

// FuzzVerify: no file makes the check panic, and what passes is what a log can hold: unless it is
// one of the seeds, no findings means that every line is chained.
func FuzzVerify(f *testing.F) {
	for _, name := range []string{"plain", "keyed"} {
		text := read(f, filepath.Join("testdata", name+".jsonl"))
		f.Add(text, name == "keyed")
		f.Add(text[:len(text)-9], name == "keyed")
		f.Add(text[300:], name == "keyed")
	}
	f.Add([]byte("\n\n{\"seq\":1,\"hash\":\"\"}\n"), false)
	f.Fuzz(func(t *testing.T, text []byte, keyed bool) {
		var key []byte
		if keyed {
			key = testKey
		}
		r, err := Verify(VerifyOptions{Key: key}, Input{"a", bytes.NewReader(text)})
		if err != nil {
			if !errors.Is(err, ErrKeyed) {
				t.Fatal(err)
			}
			return
		}
		if r.OK && (r.Records == 0 || !bytes.HasSuffix(text, []byte("\n"))) {
			t.Errorf("passes: %+v", r)
		}
		if r.OK && keyed && !bytes.HasPrefix(read(t, "testdata/keyed.jsonl"), text) {
			t.Errorf("a keyed chain was made without the key: %q", text)
		}
	})
}
