package compose

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestWalk runs the commands in README's section about Docker Compose unchanged, with both
// generations of Compose, and compares their output with that in the README. Numbers, sizes, times
// and the width of columns may differ, and "…" stands for anything.
func TestWalk(t *testing.T) {
	for name, compose := range map[string]func(*testing.T) []string{"v2": composeV2, "v1": composeV1} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, compose(t))
			commands := console(t, "README.md", "## Try it with Docker Compose")
			if len(commands) < 5 {
				t.Fatalf("the README has %d commands", len(commands))
			}
			for _, c := range commands {
				s.shell(c)
			}
			s.healthy("etcd-1", "etcd-2", "etcd-3", "proxy-1", "proxy-2")
			if name != "v2" {
				return // docker-compose ps has no -a
			}
			bin := filepath.Join(s.scratch, "bin")
			if err := os.Mkdir(bin, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(harness.Bin(t, "etcdctl-3.7"), filepath.Join(bin, "etcdctl")); err != nil {
				t.Fatal(err)
			}
			s.env = append(s.env, "PATH="+bin+":"+os.Getenv("PATH"))
			here := strings.NewReplacer("./client", s.scratch+"/client", "=client/", "="+s.scratch+"/client/",
				"127.0.0.1:12379", s.ports["PROXY_1_ADDRESS"], "127.0.0.1:12389", s.ports["PROXY_2_ADDRESS"])
			for _, c := range console(t, "docs/deploy/compose.md", "## Connect from the host") {
				c.line = here.Replace(strings.Replace(c.line, "docker cp", dockerClient()+" cp", 1))
				s.shell(c)
			}
		})
	}
}

// command is a line `$ …` of a page, with the output lines below it.
type command struct {
	line string
	want []string
}

// console returns the commands of the console blocks of a page's section.
func console(t *testing.T, page, heading string) (commands []command) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", page))
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(data), heading+"\n")
	if !ok {
		t.Fatalf("%s has no section %q", page, heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	for n, block := range strings.Split(section, "```") {
		text, isConsole := strings.CutPrefix(block, "console\n")
		if n%2 == 0 || !isConsole {
			continue
		}
		for line := range strings.Lines(text) {
			line = strings.TrimRight(line, "\n")
			if shown, ok := strings.CutPrefix(line, "$ "); ok {
				commands = append(commands, command{line: shown})
			} else if last := &commands[len(commands)-1]; strings.HasSuffix(last.line, `\`) {
				last.line = strings.TrimSuffix(last.line, `\`) + line
			} else {
				last.want = append(last.want, line)
			}
		}
	}
	return commands
}

// shell runs a command of a page and compares its standard output.
func (s *stack) shell(c command) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*within)
	defer cancel()
	line := strings.ReplaceAll(c.line, "docker compose ", strings.Join(s.compose, " ")+" ")
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Dir = s.folder
	cmd.Env = append(append(os.Environ(), s.env...), "COMPOSE_PROJECT_NAME="+s.project)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("$ %s: %v\n%s%s", c.line, err, out, stderr.String())
	}
	got := strings.TrimRight(strings.ReplaceAll(string(out), "\r", ""), "\n")
	if want := strings.Join(c.want, "\n"); len(c.want) > 0 && !pattern(want).MatchString(spaces.ReplaceAllString(got, " ")) {
		s.t.Errorf("$ %s prints\n%s\nand not\n%s", c.line, got, want)
	}
	s.t.Logf("$ %s\n%s", c.line, got)
}

var (
	spaces = regexp.MustCompile(`[ \t]+`)
	digits = regexp.MustCompile(`[0-9]+`)
)

// pattern matches the output on a page.
func pattern(want string) *regexp.Regexp {
	want = regexp.QuoteMeta(spaces.ReplaceAllString(want, " "))
	want = digits.ReplaceAllString(strings.ReplaceAll(want, "…", `.*`), `[0-9]+`)
	return regexp.MustCompile(`(?s)\A` + want + `\z`)
}
