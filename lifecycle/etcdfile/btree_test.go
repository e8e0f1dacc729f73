package etcdfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// newDatabase makes one with n values of 1000 bytes under a ruled key, and returns its path.
func newDatabase(t testing.TB, n uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{PageSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, other := range []string{"alarm", "lease", "meta"} {
			if _, err := tx.CreateBucket([]byte(other)); err != nil {
				return err
			}
		}
		b, err := tx.CreateBucket([]byte(keyBucket))
		for i := uint64(1); i <= n && err == nil; i++ {
			revision := binary.BigEndian.AppendUint64(append(binary.BigEndian.AppendUint64(nil, i), '_'), 0)
			err = b.Put(revision, bytesField(bytesField(nil, 1, []byte(ruled+"a")), 5, bytes.Repeat([]byte("v"), 1000)))
		}
		return err
	})
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func present(t testing.TB, path string) ([]Value, error) {
	return LiveValues(t.Context(), path, func([]byte) bool { return true })
}

// TestCutDatabase: what is left of a database that was cut may be readable, and must not pass for
// the whole.
func TestCutDatabase(t *testing.T) {
	path := newDatabase(t, 200)
	if _, err := present(t, path); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o400, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	size := 0 // the file may be made longer ahead of time
	_ = db.View(func(tx *bbolt.Tx) error { size = int(tx.Size()); return nil })
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{size - 1, size / 2, 3 * 4096, 5000} {
		if err := os.WriteFile(path, content[:at], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := present(t, path); err == nil {
			t.Errorf("cut at %d of %d: no error", at, size)
		}
		if f, _ := inspect(t, "db", content[:at], Config{}); len(f.Notes) == 0 {
			t.Errorf("cut at %d of %d: no note", at, size)
		}
	}
}

// TestDamagedPages: wherever a page leads, also in a circle, nothing is read for ever. What lies in
// the page is read, or is said to be damaged.
func TestDamagedPages(t *testing.T) {
	for _, n := range []uint64{1, 200} { // the first is kept within the page of the buckets
		path := newDatabase(t, n)
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if f, found := inspect(t, "db", content, Config{}); len(f.Notes) > 0 || len(found) != int(n) {
			t.Fatalf("undamaged: %d of %d, %v", len(found), n, f.Notes)
		}
		damaged := 0
		leaves := 0
		for page := 2; page < len(content)/4096; page++ {
			switch binary.LittleEndian.Uint16(content[page*4096+8:]) {
			case branchPage:
			case leafPage:
				if leaves++; leaves > 5 {
					continue
				}
			default:
				continue
			}
			// The header, and two elements.
			for _, at := range []int{0, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44} {
				for _, value := range []uint32{0, 1, uint32(page), 4, 0xffff, 0xffffffff} {
					place := page*4096 + at
					was := [4]byte(content[place:])
					binary.LittleEndian.PutUint32(content[place:], value)
					if err := os.WriteFile(path, content, 0o600); err != nil {
						t.Fatal(err)
					}
					f, _ := inspect(t, "db", content, Config{})
					if len(f.Notes) > 0 {
						damaged++
					}
					_, _ = present(t, path)
					copy(content[place:], was[:])
				}
			}
		}
		if damaged == 0 {
			t.Error("nothing is damaged")
		}
	}
}

// TestPageInACircle: bbolt's cursor would follow it until there is no memory left.
func TestPageInACircle(t *testing.T) {
	path := newDatabase(t, 200)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	branch := 0
	for page := 2; page < len(content)/4096; page++ {
		if head := content[page*4096:]; binary.LittleEndian.Uint16(head[8:]) == branchPage {
			branch = page
			binary.LittleEndian.PutUint64(head[pageHeader+8:], uint64(page))
		}
	}
	if branch == 0 {
		t.Fatal("there is no branch")
	}
	f, found := inspect(t, "db", content, Config{})
	if len(f.Notes) != 1 || !strings.Contains(f.Notes[0], "used twice") || len(found) == 0 {
		t.Errorf("%v, %d findings", f.Notes, len(found))
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := present(t, path); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("decrypt: %v", err)
	}
}
