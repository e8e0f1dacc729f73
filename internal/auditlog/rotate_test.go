package auditlog

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestConcurrentRotation: records of many writers are all there, in files that follow each other.
func TestConcurrentRotation(t *testing.T) {
	const writers, each = 8, 200
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.jsonl")
	l := open(t, Config{Path: path, Key: testKey, MaxSize: 8 << 10, MaxFiles: 1000})
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				l.Record(Record{Event: EventKMS, RequestID: fmt.Sprintf("w%d-%d", w, i)})
				_ = l.Check()
			}
		})
	}
	all.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	older, err := rotated(path)
	if err != nil || len(older) < 10 {
		t.Fatalf("%d older files, %v", len(older), err)
	}
	// The shell's order of audit.jsonl* is not the log's.
	r := good(t, writers*each, testKey, append([]string{path}, older...)...)
	if len(r.Files) != len(older)+1 || r.Files[len(older)].File != path || len(r.Notes) > 0 {
		t.Errorf("files in the wrong order: %+v", r)
	}
	var text strings.Builder
	for _, f := range append(older, path) {
		data := read(t, f)
		if len(data) > 8<<10 {
			t.Errorf("%s has %d bytes", f, len(data))
		}
		text.Write(data)
		// Each can be checked alone.
		if r := verify(t, testKey, f); !r.OK {
			t.Errorf("%s: %+v", f, r.Findings)
		}
	}
	for w := range writers {
		for i := range each {
			if n := strings.Count(text.String(), fmt.Sprintf(`"w%d-%d"`, w, i)); n != 1 {
				t.Fatalf("record %d of writer %d is there %d times", i, w, n)
			}
		}
	}
	// A file that is missing in between is found.
	if r := verify(t, testKey, append(older[:3:3], older[4:]...)...); r.OK || r.Findings[0].Kind != KindMissing {
		t.Errorf("without a file in between: %+v", r.Findings)
	}
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.jsonl")
	overwrite(t, path+".old", []byte("not ours"))
	overwrite(t, path+".123", []byte("not ours"))
	l := open(t, Config{Path: path, MaxSize: 1, MaxFiles: 3}) // every record in a file of its own
	for i := range 10 {
		l.Record(call(i))
	}
	_ = l.Close()
	older, err := rotated(path)
	if err != nil || len(older) != 2 || filepath.Base(older[0]) != "audit.jsonl.000000000008" {
		t.Fatalf("older files: %v, %v", older, err)
	}
	r := good(t, 3, nil, append(older, path)...)
	if r.FirstSeq != 8 || len(r.Notes) != 1 {
		t.Errorf("report = %+v", r)
	}
	for _, name := range []string{path + ".old", path + ".123"} {
		if string(read(t, name)) != "not ours" {
			t.Error("a file that is not the log's was touched")
		}
	}
	// A crash between the two steps of a rotation leaves no file, or an empty one, at the path.
	for i := range 2 {
		if err := os.Rename(path, fmt.Sprintf("%s-%03d", older[1], i+1)); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			overwrite(t, path, nil)
		}
		l = open(t, Config{Path: path})
		l.Record(call(11))
		_ = l.Close()
		if older, err = rotated(path); err != nil || len(older) != 3+i {
			t.Fatalf("%q, %v", older, err)
		}
		good(t, 4+i, nil, append(older, path)...)
	}
}

// TestRotationAfterALostLineBreak: the record that a crash has left without its line break is a
// whole one, wherever the next one goes.
func TestRotationAfterALostLineBreak(t *testing.T) {
	path := sample(t, 3, nil)
	overwrite(t, path, bytes.TrimSuffix(read(t, path), []byte("\n")))
	l := open(t, Config{Path: path, MaxSize: 1})
	l.Record(call(3))
	l.Record(call(4))
	_ = l.Close()
	older, err := rotated(path)
	if err != nil || len(older) != 1 {
		t.Fatalf("%q, %v", older, err)
	}
	if r := good(t, 5, nil, append(older, path)...); len(r.Notes) > 0 {
		t.Errorf("notes: %+v", r.Notes)
	}
}
