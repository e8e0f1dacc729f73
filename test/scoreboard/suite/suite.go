// Package suite runs the tests of another project with a proxy in front of each of its etcds.
//
// The tests run from a copy of their module, in which the framework that starts etcd starts a
// proxy that encrypts every key as well, and the tests' clients connect to the proxy. The copy is
// made for each run: this repository has only the edits.
package suite

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Suite describes the tests. Its files are relative to the package that runs it.
type Suite struct {
	Name     string // for the report
	Module   string
	Parts    []string // the files and folders of the module that are copied
	Packages []string // of the module
	Args     []string // for go test
	TestArgs []string // for the test programs

	// Edits put the proxy in front of etcd. They are left out if SCOREBOARD_BARE is set.
	Edits []Edit
	// Files are copied into the module: from a file here to one there. Empty: removed there.
	Files map[string]string

	// Known lists tests that fail, and LeftOut tests that do not run, each with the reason.
	Known, LeftOut string
	// Tests is how many tests a whole run has at least, and Values how many encrypted values their
	// etcds have stored at least.
	Tests, Values int
}

// Edit replaces a text that a file contains exactly once.
type Edit struct{ File, Old, New string }

const (
	timeout  = "80m" // of one test program
	together = 25    // tests in one process
	rounds   = 5     // of tests that did not run because of others
	repeats  = 2     // of a test that failed
)

// Run runs the tests. One that fails with the proxy, also when it is repeated alone, passes
// without the proxy, and has no known reason, is an error.
func Run(t *testing.T, s Suite) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes a quarter of an hour: make scoreboard, make scoreboard-kubernetes")
	}
	start := time.Now()
	known, leftOut := readReasons(t, s.Known), readReasons(t, s.LeftOut)
	packages, whole := s.choose(t)
	r := newRun(t, s, packages, os.Getenv("SCOREBOARD_BARE") != "")
	got := r.runAll(t, packages, known, leftOut)
	again := r.repeat(t, got, known, leftOut)
	encrypted := r.report(t, got, known, leftOut, again, time.Since(start))
	if !whole || r.bare {
		return
	}
	if len(got.result) < s.Tests {
		t.Errorf("only %d tests ran, not %d", len(got.result), s.Tests)
	}
	if encrypted < s.Values {
		t.Errorf("the etcds stored only %d values, not %d", encrypted, s.Values)
	}
	for name := range known {
		if result := got.result[name]; result != "fail" {
			t.Logf("%s: %s; %s says that it fails", name, result, s.Known)
		}
	}
}

// choose returns the packages that run, and whether the whole suite does.
func (s *Suite) choose(t *testing.T) (packages []string, whole bool) {
	t.Helper()
	chosen := strings.Fields(os.Getenv("SCOREBOARD_PACKAGES"))
	for _, p := range s.Packages {
		if len(chosen) == 0 || slices.Contains(chosen, p) {
			packages = append(packages, p)
		}
	}
	if len(packages) == 0 {
		t.Skipf("SCOREBOARD_PACKAGES names no package of %s", s.Name)
	}
	return packages, len(chosen) == 0 && os.Getenv("SCOREBOARD_RUN") == "" && os.Getenv("SCOREBOARD_SHARD") == ""
}

// run is a copy of the module, with or without proxies, and its test programs.
type run struct {
	Suite
	dir  string
	bare bool
	key  string // of the proxies

	test2json string // the program of that name
}

func newRun(t *testing.T, s Suite, packages []string, bare bool) *run {
	t.Helper()
	r := &run{Suite: s, dir: t.TempDir(), bare: bare, test2json: command(t, "go", "tool", "-n", "test2json")}
	modfile := r.copyModule(t)
	if !bare {
		r.key = newKey(t, r.dir)
	}
	args := append([]string{"test", "-c", "-vet=off", "-modfile", modfile, "-o", r.dir + "/bin/"}, r.Args...)
	for _, p := range packages {
		args = append(args, r.Module+"/"+p)
	}
	command(t, "env", append([]string{"GOFLAGS=", "go"}, args...)...)
	return r
}

func (r *run) program(pkg string) string {
	return filepath.Join(r.dir, "bin", path.Base(pkg)+".test")
}

// runAll runs the tests of each package, several in one process. Tests that did not run, because
// the process ended early or a test before them left goroutines, run in another one. So do those
// that fail for a known reason: they leave goroutines.
func (r *run) runAll(t *testing.T, packages []string, known, leftOut map[string]string) *results {
	t.Helper()
	got := newResults()
	shard, want := parseShard(t), parsePattern(t)
	for _, pkg := range packages {
		var tests, knownTests []string
		for i, test := range r.list(t, pkg) {
			switch name := pkg + "." + test; {
			case !want.MatchString(test) || i%shard.of != shard.part-1 || leftOut[name] != "":
			case known[name] != "":
				knownTests = append(knownTests, test)
			default:
				tests = append(tests, test)
			}
		}
		for range rounds {
			for some := range slices.Chunk(tests, together) {
				r.test(t, got, pkg, some, leftOut)
			}
			tests = slices.DeleteFunc(tests, func(test string) bool {
				result := got.result[pkg+"."+test]
				return result != "" && result != leaked
			})
		}
		for _, test := range tests {
			got.result[pkg+"."+test] = "fail"
		}
		for _, test := range knownTests {
			r.test(t, got, pkg, []string{test}, leftOut)
		}
	}
	if len(got.result) == 0 {
		t.Fatal("no test ran")
	}
	return got
}

// list returns the names of a package's tests.
func (r *run) list(t *testing.T, pkg string) []string {
	t.Helper()
	var names []string
	cmd := exec.CommandContext(t.Context(), r.program(pkg), append([]string{"-test.list=^(Test|Example)"}, r.TestArgs...)...)
	cmd.Dir = filepath.Join(r.dir, "m", pkg)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("list the tests of %s: %v", pkg, err)
	}
	for name := range strings.Lines(string(out)) {
		if name = strings.TrimSpace(name); strings.HasPrefix(name, "Test") || strings.HasPrefix(name, "Example") {
			names = append(names, name)
		}
	}
	return names
}

// repeat runs tests again that failed, each alone, because a machine with other work fails tests
// with short timeouts. It returns why a failure does not count.
func (r *run) repeat(t *testing.T, got *results, known, leftOut map[string]string) map[string]string {
	t.Helper()
	again := make(map[string]string)
	try := func(r *run, name, result, why string) {
		pkg, test, _ := strings.Cut(name, ".")
		if g := newResults(); known[name] == "" && again[name] == "" && r.test(t, g, pkg, []string{test}, leftOut) && g.result[name] == result {
			again[name] = why
		}
	}
	failed := got.with("fail")
	for i := range repeats {
		for _, name := range failed {
			try(r, name, "pass", fmt.Sprintf("passes in repetition %d", i+1))
		}
	}
	failed = slices.DeleteFunc(failed, func(name string) bool { return known[name] != "" || again[name] != "" })
	if len(failed) == 0 || r.bare {
		return again
	}
	var packages []string
	for _, name := range failed {
		pkg, _, _ := strings.Cut(name, ".")
		packages = append(packages, pkg)
	}
	slices.Sort(packages)
	bare := newRun(t, r.Suite, slices.Compact(packages), true)
	for _, name := range failed {
		try(bare, name, "fail", "fails without the proxy too")
	}
	return again
}

type shard struct{ part, of int }

// parseShard reads SCOREBOARD_SHARD: 2/3 is the second of three parts.
func parseShard(t *testing.T) shard {
	t.Helper()
	s := shard{1, 1}
	if text := os.Getenv("SCOREBOARD_SHARD"); text != "" {
		if n, err := fmt.Sscanf(text, "%d/%d", &s.part, &s.of); n != 2 || err != nil || s.part < 1 || s.part > s.of {
			t.Fatalf("SCOREBOARD_SHARD=%s is not like 2/3", text)
		}
	}
	return s
}

func parsePattern(t *testing.T) *regexp.Regexp {
	t.Helper()
	want, err := regexp.Compile(os.Getenv("SCOREBOARD_RUN"))
	if err != nil {
		t.Fatalf("SCOREBOARD_RUN: %v", err)
	}
	return want
}

// skipPattern is for -test.skip: the tests of a package that are left out, of which some are
// subtests.
func skipPattern(pkg string, leftOut map[string]string) string {
	var patterns []string
	for _, name := range slices.Sorted(maps.Keys(leftOut)) {
		p, test, _ := strings.Cut(name, ".")
		if p != pkg {
			continue
		}
		var levels []string
		for level := range strings.SplitSeq(test, "/") {
			levels = append(levels, "^"+regexp.QuoteMeta(level)+"$")
		}
		patterns = append(patterns, strings.Join(levels, "/"))
	}
	return strings.Join(patterns, "|")
}

// test runs tests of a package in one process, and reports whether there were any.
func (r *run) test(t *testing.T, got *results, pkg string, tests []string, leftOut map[string]string) bool {
	t.Helper()
	if len(tests) == 0 {
		return false
	}
	args := []string{
		"-t", "-p", pkg, r.program(pkg), "-test.v=test2json", "-test.count=1", "-test.timeout=" + timeout,
		"-test.run=^(" + strings.Join(tests, "|") + ")$", "-test.skip=" + skipPattern(pkg, leftOut),
	}
	cmd := exec.CommandContext(t.Context(), r.test2json, append(args, r.TestArgs...)...)
	cmd.Dir = filepath.Join(r.dir, "m", pkg)
	// A test creates its sockets, whose paths must be short, in its folder. Files that it leaves
	// are removed with the copy.
	cmd.Env = append(os.Environ(), "TMPDIR="+r.dir, "SCOREBOARD_RECORD="+r.record())
	if !r.bare {
		cmd.Env = append(cmd.Env, "SCOREBOARD_PROXY="+proxyBinary(t), "SCOREBOARD_KEY="+r.key)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(io.TeeReader(out, r.all(t)))
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e struct{ Action, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &e) == nil && e.Test != "" {
			got.note(pkg, e.Test, e.Action, e.Output)
		}
	}
	err = cmd.Wait()
	r.killLeft()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatalf("%s: %v\n%s", pkg, err, errs.Bytes())
	}
	if errs.Len() > 0 {
		t.Logf("%s: %s", pkg, errs.Bytes())
	}
	return true
}

// killLeft ends the processes that tests have left behind: a test that fails does not stop its
// etcds, and the next ones need their ports. All have the folder of the run in their arguments.
func (r *run) killLeft() {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		args, _ := os.ReadFile(file)
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil && bytes.Contains(args, []byte(r.dir)) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// all is where the complete output goes.
func (r *run) all(t *testing.T) io.Writer {
	t.Helper()
	file := os.Getenv("SCOREBOARD_OUTPUT")
	if file == "" {
		return io.Discard
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func (r *run) record() string { return filepath.Join(r.dir, "record") }

const keep = 8 << 10 // the last bytes of a test's output

// results are those of top-level tests, by package and name.
type results struct {
	result map[string]string
	output map[string]string // by test and subtest
	failed []string          // also subtests

	logging map[string]bool // a test is in the middle of a log record
}

func newResults() *results {
	return &results{result: make(map[string]string), output: make(map[string]string), logging: make(map[string]bool)}
}

// leaked is the result of a test that etcd's framework skipped, because a test before it has left
// goroutines.
const leaked = "leaked"

// note records a top-level test by its own result.
func (r *results) note(pkg, test, action, output string) {
	name := pkg + "." + test
	switch action {
	case "output":
		if r.logging[name] = r.logging[name] || strings.Contains(output, " logger.go:"); r.logging[name] {
			// A log record, which may be cut into several pieces of output.
			r.logging[name] = !strings.HasSuffix(output, "\n")
			return
		}
		o := r.output[name] + output
		r.output[name] = o[max(0, len(o)-keep):]
	case "pass", "fail", "skip":
		if action == "skip" && strings.Contains(r.output[name], "Found leaked goroutin") {
			action = leaked
		}
		if action == "pass" || action == leaked {
			delete(r.output, name)
		}
		if action == "fail" {
			r.failed = append(r.failed, name)
		}
		if !strings.Contains(test, "/") {
			r.result[name] = action
		}
	}
}

// with returns the names of the tests with a result.
func (r *results) with(result string) []string {
	var names []string
	for name, got := range r.result {
		if got == result {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// outputOf is the output of a test that failed: its own, and that of its subtests that failed.
func (r *results) outputOf(name string) string {
	text := r.output[name]
	for _, sub := range r.failed {
		if strings.HasPrefix(sub, name+"/") {
			text += r.output[sub]
		}
	}
	return text
}

// report prints the counts, and reports failures and plaintext. It returns how many encrypted
// values the etcds stored.
func (r *run) report(t *testing.T, got *results, known, leftOut, again map[string]string, took time.Duration) (encrypted int) {
	t.Helper()
	counts := make(map[string]int)
	for _, result := range got.result {
		counts[result]++
	}
	proxies, encrypted, plaintext := r.readRecord(t)
	t.Logf("%s: %d pass, %d fail, %d skipped by themselves, of %d; %d left out; %d proxies; %d encrypted values in the files of etcd; %s",
		r.Name, counts["pass"], counts["fail"], counts["skip"], len(got.result), len(leftOut), proxies, encrypted, took.Round(time.Second))
	for _, name := range slices.Sorted(maps.Keys(got.result)) {
		switch {
		case got.result[name] == "skip":
			t.Logf("%s skips itself: %s", name, lastLine(got.output[name]))
		case got.result[name] != "fail":
		case known[name] != "":
			t.Logf("%s fails, as is known: %s", name, known[name])
		case again[name] != "":
			t.Logf("%s failed, and %s\n%s", name, again[name], got.outputOf(name))
		default:
			t.Errorf("%s\n%s", name, got.outputOf(name))
		}
	}
	for _, p := range plaintext {
		t.Errorf("etcd stored plaintext: %s", p)
	}
	return encrypted
}

// lastLine is the reason that a test gives before it skips itself.
func lastLine(output string) string {
	var last string
	for line := range strings.Lines(output) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "---") {
			last = line
		}
	}
	return last
}

// readRecord returns how many proxies were started, and what the etcds stored.
func (r *run) readRecord(t *testing.T) (proxies, encrypted int, plaintext []string) {
	t.Helper()
	text, err := os.ReadFile(r.record())
	if err != nil && !r.bare {
		t.Fatalf("no proxy was started: %v", err)
	}
	for line := range bytes.Lines(text) {
		var what, name, key string
		var with, without int
		fields := []any{&what, &name, &with, &without, &key}
		if err := json.Unmarshal(line, &fields); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		switch {
		case what == "proxy":
			proxies++
		case without > 0:
			plaintext = append(plaintext, fmt.Sprintf("%s: %d values, for example at the key %q", name, without, key))
		}
		encrypted += with
	}
	return proxies, encrypted, plaintext
}

// copyModule copies the tests, with a proxy in front of each etcd unless bare, and returns a
// go.mod that uses the copy.
func (r *run) copyModule(t *testing.T) (modfile string) {
	t.Helper()
	from := command(t, "go", "list", "-m", "-f", "{{.Dir}}", r.Module)
	to := filepath.Join(r.dir, "m")
	for _, part := range append(r.Parts, "go.mod") {
		command(t, "mkdir", "-p", filepath.Join(to, filepath.Dir(part)))
		command(t, "cp", "-r", "--no-preserve=mode", filepath.Join(from, part), filepath.Join(to, part))
	}
	for file, source := range r.Files {
		file = filepath.Join(to, file)
		switch {
		case source == "":
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		case !r.bare:
			command(t, "mkdir", "-p", filepath.Dir(file))
			write(t, file, read(t, source))
		}
	}
	for _, e := range r.Edits {
		if r.bare {
			break
		}
		file := filepath.Join(to, e.File)
		text := read(t, file)
		if n := strings.Count(text, e.Old); n != 1 {
			t.Fatalf("%s of %s has %d times, not once: %s", e.File, r.Module, n, e.Old)
		}
		write(t, file, strings.Replace(text, e.Old, e.New, 1))
	}
	gomod := command(t, "go", "env", "GOMOD")
	modfile = filepath.Join(r.dir, "go.mod")
	write(t, modfile, read(t, gomod)+fmt.Sprintf("\nreplace %s => %s\n", r.Module, to))
	write(t, filepath.Join(r.dir, "go.sum"), read(t, path.Join(path.Dir(gomod), "go.sum")))
	return modfile
}

// readReasons reads lines with the name of a test, and the reason why it is in the file.
func readReasons(t *testing.T, file string) map[string]string {
	t.Helper()
	reasons := make(map[string]string)
	if file == "" {
		return reasons
	}
	for line := range strings.Lines(read(t, file)) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, why, ok := strings.Cut(line, " ")
		if why = strings.TrimSpace(why); !ok || why == "" {
			t.Errorf("%s: %s without a reason", file, name)
		}
		reasons[name] = why
	}
	return reasons
}

func proxyBinary(t *testing.T) string {
	t.Helper()
	return Binary(t, "etcd-kms-proxy", "make build")
}

// Binary is a program that make has built.
func Binary(t *testing.T, name, how string) string {
	t.Helper()
	dir := os.Getenv("ETCD_KMS_PROXY_BIN")
	if dir == "" {
		dir = filepath.Join(filepath.Dir(command(t, "go", "env", "GOMOD")), "..", "..", ".bin")
	}
	file, err := filepath.Abs(filepath.Join(dir, name))
	if err == nil {
		_, err = os.Stat(file)
	}
	if err != nil {
		t.Fatalf("find %s: %v; run `%s` first", name, err, how)
	}
	return file
}

func newKey(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(dir, "key.yaml")
	command(t, proxyBinary(t), "kms", "new-local-key", file)
	return file
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, errs.Bytes())
	}
	return strings.TrimSpace(string(out))
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
