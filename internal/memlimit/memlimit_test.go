package memlimit

import (
	"os"
	"runtime/debug"
	"testing"
	"testing/fstest"
)

func files(contents map[string]string) fstest.MapFS {
	root := make(fstest.MapFS)
	for name, content := range contents {
		root[name] = &fstest.MapFile{Data: []byte(content)}
	}
	return root
}

const mountV2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"

func TestCgroupLimit(t *testing.T) {
	const mountsV1 = "25 30 0:22 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n" +
		"36 30 0:33 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
	for name, test := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"no cgroup": {nil, 0},
		"version 2": {map[string]string{
			"proc/self/cgroup": "0::/system.slice/proxy.service\n", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/system.slice/proxy.service/memory.max": "268435456\n",
			"sys/fs/cgroup/system.slice/memory.max":               "max\n",
		}, 256 << 20},
		"version 2, the limit of a parent is lower": {map[string]string{
			"proc/self/cgroup": "0::/a/b/c\n", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/b/c/memory.max": "2000\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "1000\n",
		}, 1000},
		"version 2, no limit": {map[string]string{
			"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/a/memory.max": "max\n",
		}, 0},
		"version 2 in a container with its own namespace": {map[string]string{
			"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/memory.max": "4096\n",
		}, 4096},
		"version 2 in a container, named from outside": {map[string]string{
			"proc/self/cgroup":         "0::/kubepods/pod1/container1\n",
			"proc/self/mountinfo":      "30 23 0:26 /kubepods/pod1/container1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
			"sys/fs/cgroup/memory.max": "8192\n",
		}, 8192},
		"version 2, a cgroup above the root": {map[string]string{
			"proc/self/cgroup": "0::/../other\n", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/memory.max": "4096\n",
		}, 4096},
		"version 1": {map[string]string{
			"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n", "proc/self/mountinfo": mountsV1,
			"sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "1048576\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":            "9223372036854771712\n",
		}, 1 << 20},
		"version 1, no limit": {map[string]string{
			"proc/self/cgroup": "4:memory:/\n", "proc/self/mountinfo": mountsV1,
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
		}, 0},
		"both versions": {map[string]string{
			"proc/self/cgroup":                             "4:memory:/x\n0::/x\n",
			"proc/self/mountinfo":                          mountsV1 + "42 30 0:39 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "5000\n",
		}, 5000},
		"a mount point with a space": {map[string]string{
			"proc/self/cgroup":    "0::/a\n",
			"proc/self/mountinfo": `30 23 0:26 / /c\040g rw - cgroup2 cgroup2 rw` + "\n",
			"c g/a/memory.max":    "7000\n",
		}, 7000},
		"garbage": {map[string]string{
			"proc/self/cgroup": "0:\n0::/a\n", "proc/self/mountinfo": "30 - cgroup2\n\n" + mountV2, "sys/fs/cgroup/a/memory.max": "-5\n",
		}, 0},
	} {
		if got := cgroupLimit(files(test.files)); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}

func TestEnvironmentWins(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Setenv("GOMEMLIMIT", "off")
	if got := Set(); got != 0 || debug.SetMemoryLimit(-1) != before {
		t.Errorf("the limit was set to %d", got)
	}
}

func TestSet(t *testing.T) {
	if _, ok := os.LookupEnv("GOMEMLIMIT"); ok {
		t.Skip("the environment sets GOMEMLIMIT")
	}
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	limit := cgroupLimit(os.DirFS("/"))
	if got := Set(); got != limit/100*share || limit > 0 && debug.SetMemoryLimit(-1) != got {
		t.Errorf("the cgroup has %d, and the runtime was set to %d", limit, got)
	}
}

func TestSetGrowth(t *testing.T) {
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	for _, tt := range []struct {
		environment string
		want        int
	}{{"200", 100}, {"off", 100}, {"", growth}} {
		t.Setenv("GOGC", tt.environment)
		SetGrowth()
		if got := debug.SetGCPercent(100); got != tt.want {
			t.Errorf("GOGC=%q: %d, want %d", tt.environment, got, tt.want)
		}
	}
}
