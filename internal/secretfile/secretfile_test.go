package secretfile

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	passwd := write("passwd", "root:x:0:0:root:/root:/bin/sh\nproxy:x:1000:1000::/:/bin/false\nother:x:1001:300::/:/bin/false\n# a comment\n")
	group := write("group", "root:x:0:\nproxy:x:1000:\nown:x:200:proxy,root\nshared:x:201:proxy,other\nprimary:x:300:\n")
	gone := filepath.Join(dir, "gone")
	self := process{uid: 1000, groups: []int{1000, 200, 201, 300, 5000}, passwd: passwd, group: group}
	// as in an image without users
	bare := process{uid: 65532, groups: []int{65532, 2000}, passwd: gone, group: gone}
	root := process{uid: 0, groups: []int{0, 2000}, passwd: passwd, group: group}
	for name, c := range map[string]struct {
		by       process
		mode     fs.FileMode
		uid, gid int
		want     string // in the problem; "" for none
		fix      string
	}{
		"own":                         {self, 0o600, 1000, 1000, "", ""},
		"own, read only":              {self, 0o400, 1000, 1000, "", ""},
		"of root":                     {self, 0o400, 0, 0, "", ""},
		"of another user":             {self, 0o600, 1001, 1000, "its owner is user 1001", "chown 1000"},
		"of another user, open":       {self, 0o644, 1001, 1000, "its owner is user 1001", "chown 1000"},
		"read by root":                {root, 0o600, 1000, 1000, "", ""},
		"others may read":             {self, 0o604, 1000, 1000, "(mode 0604)", "chmod 600"},
		"all may read":                {self, 0o644, 1000, 1000, "(mode 0644)", "chmod 600"},
		"read by root, open":          {root, 0o644, 0, 0, "(mode 0644)", "chmod 600"},
		"the group may write":         {self, 0o660, 0, 200, "(mode 0660)", "chmod 600"},
		"the group may write only":    {self, 0o420, 0, 200, "(mode 0420)", "chmod 600"},
		"the group may execute":       {self, 0o450, 0, 200, "(mode 0450)", "chmod 600"},
		"others may execute":          {self, 0o401, 0, 200, "(mode 0401)", "chmod 600"},
		"a group of its own":          {self, 0o440, 0, 200, "", ""},
		"a group of its own, 0640":    {self, 0o640, 1000, 200, "", ""},
		"its primary group":           {self, 0o440, 0, 1000, "", ""},
		"a group without an entry":    {self, 0o440, 0, 5000, "", ""},
		"a shared group":              {self, 0o440, 0, 201, `user "other" has group 201 too`, "chmod 600"},
		"another's primary group":     {self, 0o440, 0, 300, `user "other" has group 300 too`, "chmod 600"},
		"a group that it has not":     {self, 0o440, 0, 400, "group 400 is none of this process", "chmod 600"},
		"group of root":               {self, 0o440, 0, 0, "group 0 is none of this process", "chmod 600"},
		"a Secret with fsGroup":       {bare, 0o440, 0, 2000, "", ""},
		"a Secret with fsGroup, root": {root, 0o440, 0, 2000, "", ""},
		"a Secret without fsGroup":    {bare, 0o444, 0, 0, "(mode 0444)", "chmod 600"},
	} {
		problem, fix := c.by.check(c.mode, c.uid, c.gid)
		if (problem == "") != (c.want == "") || !strings.Contains(problem, c.want) || fix != c.fix {
			t.Errorf("%s: %q, %q", name, problem, fix)
		}
	}
	unreadable := process{uid: 1000, groups: []int{200}, passwd: dir, group: group}
	if problem, _ := unreadable.check(0o440, 0, 200); !strings.Contains(problem, "not known") {
		t.Errorf("users that cannot be read: %q", problem)
	}
}

// TestCheckFile checks files that are there.
func TestCheckFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, good := range map[fs.FileMode]bool{0o600: true, 0o400: true, 0o644: false, 0o606: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if problem, _ := Check(path, info); (problem == "") != good {
			t.Errorf("mode %04o: %q", mode, problem)
		}
	}
}
