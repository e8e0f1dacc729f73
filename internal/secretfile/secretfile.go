// Package secretfile checks that only the user of the process and root can read and write a file
// that holds a secret, and reads it: the key files of providers and the key of the audit log.
package secretfile

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Read reads the file at path, of at most limit bytes, and returns its metadata. A file that others
// can use is an error. what names the file in errors.
func Read(what, path string, limit int64) ([]byte, fs.FileInfo, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", what, err)
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", what, err)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s %s: not a regular file", what, path)
	}
	if why, fix := Check(path, info); why != "" {
		return nil, nil, problem.New("run "+fix+" "+path+", and replace what it holds if another user has read it", "%s %s: %s", what, path, why)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) <= limit {
		return data, info, nil
	}
	clear(data)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", what, err)
	}
	return nil, nil, fmt.Errorf("%s %s: larger than %d bytes", what, path, limit)
}

// Check returns what is wrong with the open file of path, which holds a secret, and the command
// that corrects it, without the file's name. problem is empty if only root and the user of this
// process can use the file:
//
//   - Its owner is root or the user of this process. A process of root takes files of every owner,
//     since commands that root runs read what the proxy's user has.
//   - Nobody else may write it, and others may not read it. Its group may, with mode 0440 or 0640,
//     if this process has that group and no other user has: so Kubernetes mounts a Secret for a pod
//     with an fsGroup.
//   - A credential that systemd has passed to this service may have mode 0440 whatever its group
//     is.
//
// Users and groups are those of /etc/passwd and /etc/group. On systems where files have no owner,
// only the mode is checked.
func Check(path string, info fs.FileInfo) (problem, fix string) {
	if isCredential(path, info.Mode().Perm()) {
		return "", ""
	}
	uid, gid, ok := owner(info)
	if !ok {
		uid, gid = os.Geteuid(), -1
	}
	groups, err := os.Getgroups()
	if err != nil {
		groups = nil // no group is the process' own
	}
	self := process{uid: os.Geteuid(), groups: append(groups, os.Getegid()), passwd: "/etc/passwd", group: "/etc/group"}
	return self.check(info.Mode().Perm(), uid, gid)
}

// isCredential reports whether path is a credential that systemd has passed to this service
// (LoadCredential=). Its folder is for the service's user and root alone; where systemd grants that
// by an access control list, the mode that is shown is 0440.
func isCredential(path string, mode fs.FileMode) bool {
	folder := os.Getenv("CREDENTIALS_DIRECTORY")
	return folder != "" && mode&^0o440 == 0 && filepath.Clean(filepath.Dir(path)) == filepath.Clean(folder)
}

// process is the process that reads a file.
type process struct {
	uid           int
	groups        []int
	passwd, group string // the files with the users and groups
}

func (p process) check(mode fs.FileMode, uid, gid int) (problem, fix string) {
	const groupRead = 0o040
	if uid != 0 && uid != p.uid && p.uid != 0 {
		return fmt.Sprintf("its owner is user %d, and neither root nor user %d, who reads it", uid, p.uid), "chown " + strconv.Itoa(p.uid)
	}
	switch mode & 0o077 {
	case 0:
		return "", ""
	case groupRead:
		if why := p.sharedGroup(gid); why != "" {
			return fmt.Sprintf("its group may use it (mode %04o), and %s", mode, why), "chmod 600"
		}
		return "", ""
	}
	return fmt.Sprintf("users other than its owner can use it (mode %04o)", mode), "chmod 600"
}

// sharedGroup says why a group is not the process' alone, or returns "".
func (p process) sharedGroup(gid int) string {
	if !slices.Contains(p.groups, gid) {
		return fmt.Sprintf("group %d is none of this process", gid)
	}
	name := "" // of the process' user
	others := ""
	err := lines(p.passwd, func(f []string) { // name:password:uid:gid:…
		if len(f) < 4 {
			return
		}
		switch user := f[2]; {
		case user == strconv.Itoa(p.uid):
			name = f[0]
		case f[3] == strconv.Itoa(gid) && user != "0":
			others = f[0]
		}
	})
	if err == nil {
		err = lines(p.group, func(f []string) { // name:password:gid:members
			if len(f) < 4 || f[2] != strconv.Itoa(gid) {
				return
			}
			for member := range strings.SplitSeq(f[3], ",") {
				if member != "" && member != "root" && member != name {
					others = member
				}
			}
		})
	}
	switch {
	case err != nil:
		return fmt.Sprintf("who else has group %d is not known: %v", gid, err)
	case others != "":
		return fmt.Sprintf("user %q has group %d too", others, gid)
	}
	return ""
}

// lines calls visit with the fields of each line. A file that does not exist has none.
func lines(path string, visit func(fields []string)) error {
	f, err := os.Open(path) //nolint:gosec // one of two fixed names
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // it was only read
	s := bufio.NewScanner(f)
	for s.Scan() {
		visit(strings.Split(s.Text(), ":"))
	}
	return s.Err()
}
