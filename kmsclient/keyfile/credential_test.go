package keyfile

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestCredential: a file that systemd passes may have mode 0440, there and nowhere else, and no
// other bit for the group or others.
func TestCredential(t *testing.T) {
	form := Form{ID: "id", Sizes: []int{32}}
	folder, other := t.TempDir(), t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", folder+"/")
	for _, tt := range []struct {
		folder string
		mode   fs.FileMode
		ok     bool
	}{{folder, 0o400, true}, {folder, 0o440, true}, {folder, 0o444, false}, {folder, 0o460, false}, {folder, 0o640, false}, {other, 0o440, false}, {filepath.Join(folder, "below"), 0o440, false}} {
		path := filepath.Join(tt.folder, "keys_key.yaml")
		if err := os.MkdirAll(tt.folder, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := Create(path, "keys:\n"+form.Line(Key{ID: "1", Secret: make([]byte, 32)})); err != nil {
			t.Fatal(err)
		}
		// The group is one that others have: a group of the process alone is accepted anywhere.
		if err := os.Chown(path, -1, 1); err != nil {
			t.Skipf("only root can give a file to another group: %v", err)
		}
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Read(path, form); (err == nil) != tt.ok {
			t.Errorf("mode %v in %s: %v", tt.mode, tt.folder, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}
