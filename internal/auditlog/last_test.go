package auditlog

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestLast finds the newest record of several files, also behind lines that are no records.
func TestLast(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	is := func(provider string) func(Record) bool {
		return func(r Record) bool { return r.Provider == provider }
	}
	want := func(name, provider string, at time.Time) {
		t.Helper()
		if got, err := Last(path, is(provider)); err != nil || !got.Equal(at) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, at)
		}
	}
	want("without a log", "a", time.Time{})
	begin := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	l, err := Open(Config{Path: path, MaxSize: 1 << 20, MaxFiles: 5})
	if err != nil {
		t.Fatal(err)
	}
	for i, provider := range []string{"a", "b", "a", "c"} {
		l.Record(Record{Event: EventCommand, Provider: provider, Time: begin.Add(time.Duration(i) * time.Hour)})
		if i == 1 {
			l.mu.Lock()
			err := l.rotate()
			l.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"seq":9,"provider":"a","time":"tor`); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	want("in the newest file", "a", begin.Add(2*time.Hour))
	want("in an older file", "b", begin.Add(time.Hour))
	want("nowhere", "d", time.Time{})
}
