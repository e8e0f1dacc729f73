// Package memlimit limits the memory of the Go runtime.
//
// It sets the memory limit from that of the process' cgroup, as container runtimes, Kubernetes and
// systemd set it. Without it the garbage collector does not know the limit, and the kernel kills
// the process while there is garbage to collect. It also limits by how much the heap grows before
// it is collected.
package memlimit

import (
	"bufio"
	"io/fs"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// share is the share of the cgroup's limit that the runtime may use, in percent. The rest is for
// what the runtime does not count: the kernel's memory for sockets, and the pages of the binary.
const share = 90

// growth is by how much the heap grows before it is collected, in percent of what is in use. Go's
// default is 100. A call allocates little, so that a collection is rare either way: see
// docs/design/performance.md.
const growth = 50

// SetGrowth sets by how much the heap grows before it is collected, unless the environment sets
// GOGC.
func SetGrowth() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(growth)
	}
}

// Set sets the runtime's memory limit and returns it in bytes. It returns 0 and changes nothing if
// the environment sets GOMEMLIMIT, or the cgroup has no limit.
func Set() int64 {
	if _, ok := os.LookupEnv("GOMEMLIMIT"); ok {
		return 0
	}
	limit := cgroupLimit(os.DirFS("/"))
	if limit == 0 {
		return 0
	}
	limit = limit / 100 * share
	debug.SetMemoryLimit(limit)
	return limit
}

// cgroupLimit returns the lowest memory limit of the process' cgroup and those above it, in bytes;
// 0 if there is none. root is the file system, with /proc and /sys.
func cgroupLimit(root fs.FS) int64 {
	lowest := int64(math.MaxInt64)
	for hierarchy, cgroup := range cgroups(root) {
		for _, m := range mounts(root, hierarchy) {
			for dir := m.dir(cgroup); ; dir = path.Dir(dir) {
				if n, ok := readLimit(root, path.Join(dir, hierarchy.file())); ok {
					lowest = min(lowest, n)
				}
				if len(dir) <= len(m.point) {
					break
				}
			}
		}
	}
	if lowest == math.MaxInt64 {
		return 0
	}
	return lowest
}

// hierarchy is the version of a cgroup hierarchy with memory limits.
type hierarchy int

const (
	v1 hierarchy = 1
	v2 hierarchy = 2
)

func (h hierarchy) file() string {
	if h == v1 {
		return "memory.limit_in_bytes"
	}
	return "memory.max"
}

// cgroups returns the process' cgroup in each hierarchy, from /proc/self/cgroup (see cgroups(7)).
func cgroups(root fs.FS) map[hierarchy]string {
	found := make(map[hierarchy]string)
	for line := range lines(root, "proc/self/cgroup") {
		fields := strings.SplitN(line, ":", 3) // hierarchy ID, controllers, path
		switch {
		case len(fields) < 3:
		case fields[0] == "0" && fields[1] == "":
			found[v2] = fields[2]
		case hasWord(fields[1], "memory"):
			found[v1] = fields[2]
		}
	}
	return found
}

// mount is a mount of a hierarchy: root is the cgroup that the directory point shows.
type mount struct{ root, point string }

// dir returns the directory of a cgroup. In a container the cgroup may be above the mount's root,
// or named from outside; then the mount's root is the container's own.
func (m mount) dir(cgroup string) string {
	if rest, ok := strings.CutPrefix(cgroup, m.root); ok && !strings.HasPrefix(cgroup, "/..") {
		return path.Join(m.point, rest)
	}
	return m.point
}

// mounts returns the mounts of a hierarchy, from /proc/self/mountinfo (see proc_pid_mountinfo(5)).
func mounts(root fs.FS, h hierarchy) (found []mount) {
	for line := range lines(root, "proc/self/mountinfo") {
		before, after, ok := strings.Cut(line, " - ")
		fields, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(super) < 3 {
			continue
		}
		if super[0] == "cgroup2" && h == v2 || super[0] == "cgroup" && h == v1 && hasWord(super[2], "memory") {
			found = append(found, mount{root: unescape(fields[3]), point: strings.TrimPrefix(unescape(fields[4]), "/")})
		}
	}
	return found
}

// unescape replaces the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// readLimit reads a limit in bytes. Without one, the file of version 2 has the word max, and that
// of version 1 a number close to 2^63.
func readLimit(root fs.FS, file string) (int64, bool) {
	data, err := fs.ReadFile(root, file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	return n, err == nil && n > 0 && n < 1<<60
}

func hasWord(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// lines yields the lines of a file, and none if it cannot be read.
func lines(root fs.FS, file string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		f, err := root.Open(file)
		if err != nil {
			return
		}
		defer f.Close() //nolint:errcheck // it was only read
		for s := bufio.NewScanner(f); s.Scan(); {
			if !yield(s.Text()) {
				return
			}
		}
	}
}
