// Package docs tests the documentation. It runs the console blocks of the pages against a real etcd
// and compares the output with what the page shows. It also checks the links, words, line lengths
// and error texts of all pages.
//
// The test of a page prepares the state that the page describes, and runs the blocks by their
// number. In a block, a shell runs each line `$ COMMAND`, with the programs etcd-kms-proxy,
// etcdctl, etcdutl and etcd. The lines up to the next command are the expected output:
//
//   - numbers, sizes, times, IDs and the width of columns may differ;
//   - "…" matches anything within a line, and on a line of its own any lines;
//   - a command without expected output may print anything;
//   - addresses and paths of the page are replaced by those of the test.
//
// With DOCS_SHOW=1 and -v, the tests print the output of each command. The test of a page must run
// or skip every block that runs etcd-kms-proxy.
package docs

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// page is a page of docs whose blocks are run.
type page struct {
	t      *testing.T
	env    *harness.Env
	name   string
	text   string
	blocks []block
	seen   map[int]bool
	bin    string      // folder with the programs
	real   [][2]string // texts of the page, and what replaces them here
	config string      // path of the configuration that commands use by default
}

// block is a console block: its commands.
type block []command

// command is a line `$ …` with the lines that it must print.
type command struct {
	line string
	want []string
}

// open reads a page below docs, and makes the programs available. The caller calls done at the end.
func open(t *testing.T, env *harness.Env, name string) *page {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	p := &page{t: t, env: env, name: name, text: string(data), blocks: parse(string(data)), seen: make(map[int]bool), bin: filepath.Join(env.Dir, "bin")}
	if err := os.Mkdir(p.bin, 0o700); err != nil {
		t.Fatal(err)
	}
	for program, at := range map[string]string{"etcd-kms-proxy": "etcd-kms-proxy", "etcdctl": "etcdctl-3.7", "etcdutl": "etcdutl-3.7", "etcd": "etcd-3.7"} {
		if err := os.Symlink(harness.Bin(t, at), filepath.Join(p.bin, program)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// parse returns the console blocks of a page.
func parse(text string) (blocks []block) {
	var b block
	indent, inside := 0, false
	for line := range strings.Lines(text) {
		bare := strings.TrimLeft(line, " ")
		switch {
		case !inside && strings.HasPrefix(bare, "```console"):
			b, indent, inside = nil, len(line)-len(bare), true
		case inside && strings.HasPrefix(bare, "```"):
			blocks, inside = append(blocks, b), false
		case !inside:
		case strings.HasPrefix(bare, "$ "):
			b = append(b, command{line: strings.TrimSpace(bare[2:])})
		case len(b) > 0:
			last := &b[len(b)-1]
			if len(last.want) == 0 && strings.HasSuffix(last.line, `\`) {
				last.line = strings.TrimSuffix(last.line, `\`) + strings.TrimSpace(bare)
				continue
			}
			last.want = append(last.want, strings.TrimRight(line[min(indent, len(line)-1):], "\n"))
		}
	}
	return blocks
}

// means replaces a text of the page by another one, in commands and configurations. In outputs, it
// replaces the other one by the text of the page.
func (p *page) means(text, here string) { p.real = append(p.real, [2]string{text, here}) }

// here returns a text of the page with all replacements.
func (p *page) here(s string) string {
	for _, r := range p.real {
		s = strings.ReplaceAll(s, r[0], r[1])
	}
	return s
}

// yaml returns the n-th YAML block, with all replacements and without its indentation.
func (p *page) yaml(n int) string {
	p.t.Helper()
	parts := strings.Split(p.text, "```yaml\n")
	if n >= len(parts) {
		p.t.Fatalf("%s has no yaml block %d", p.name, n)
	}
	text, _, _ := strings.Cut(parts[n], "```")
	before := parts[n-1]
	indent := before[strings.LastIndex(before, "\n")+1:] // in an item of a list
	return p.here(strings.ReplaceAll("\n"+text, "\n"+indent, "\n")[1:])
}

// skip marks the n-th block as not run, and logs the reason.
func (p *page) skip(n int, why string) {
	p.seen[n] = true
	p.t.Logf("%s, block %d is not run: %s", p.name, n, why)
}

// run runs the commands of the n-th block, except those that begin with one of the texts in
// leaveOut.
func (p *page) run(n int, leaveOut ...string) {
	p.t.Helper()
	if n > len(p.blocks) {
		p.t.Fatalf("%s has no console block %d", p.name, n)
	}
	p.seen[n] = true
	for _, c := range p.blocks[n-1] {
		if slices.ContainsFunc(leaveOut, func(word string) bool { return strings.HasPrefix(c.line, word) }) {
			continue
		}
		got := p.shell(c.line)
		if os.Getenv("DOCS_SHOW") != "" {
			p.t.Logf("$ %s\n%s", c.line, got)
		}
		if len(c.want) > 0 && !same(c.want, strings.Split(strings.TrimRight(got, "\n"), "\n")) {
			p.t.Errorf("%s, block %d: $ %s\nprints\n%s\nand not\n%s", p.name, n, c.line, got, strings.Join(c.want, "\n"))
		}
	}
}

// takesConfig matches the commands that read the configuration.
var takesConfig = regexp.MustCompile(`^etcd-kms-proxy (serve|status|reencrypt|purge|verify|decrypt|drill|kms check|config check)\b`)

// shell runs a line of the page for at most a minute. It returns what the line prints on both
// outputs, without log lines in JSON, in the words of the page.
func (p *page) shell(line string) string {
	p.t.Helper()
	line = p.here(line)
	if !strings.Contains(line, "--config") {
		line = takesConfig.ReplaceAllString(line, "$0 --config "+p.config)
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Env = append(os.Environ(), "PATH="+p.bin+":"+os.Getenv("PATH"))
	cmd.Dir = p.env.Dir
	// a server that the shell waits for ends too
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.CombinedOutput()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited || ctx.Err() != nil {
		p.t.Fatalf("%s: %v, %v\n%s", line, err, ctx.Err(), out)
	}
	var kept []string
	for l := range strings.Lines(string(out)) {
		// of the proxy, of etcdctl
		if !strings.HasPrefix(l, `{"time"`) && !strings.HasPrefix(l, `{"level"`) {
			kept = append(kept, l)
		}
	}
	text := strings.Join(kept, "")
	longest := slices.SortedFunc(slices.Values(p.real), func(a, b [2]string) int { return len(b[1]) - len(a[1]) })
	for _, r := range longest {
		text = strings.ReplaceAll(text, r[1], r[0])
	}
	return text
}

// done fails the test if a block with etcd-kms-proxy was neither run nor skipped.
func (p *page) done() {
	p.t.Helper()
	for i, b := range p.blocks {
		if !p.seen[i+1] && slices.ContainsFunc(b, func(c command) bool { return strings.HasPrefix(c.line, "etcd-kms-proxy ") }) {
			p.t.Errorf("%s: console block %d is not tested: %q", p.name, i+1, b[0].line)
		}
	}
}
