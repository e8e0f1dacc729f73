package cli

import (
	"cmp"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

var (
	manFlag        = flag.String("man", "", "write the man pages to this folder")
	completionFlag = flag.String("completion", "", "write the completions of the shells to this folder")
)

// TestManPages makes a man page of each command, and those of the release with -man: so the
// library that renders them is not part of the product. Their date is SOURCE_DATE_EPOCH.
func TestManPages(t *testing.T) {
	dir := *manFlag
	if dir == "" {
		dir = t.TempDir()
	}
	root := newRoot()
	disableAutoGenTag(root)
	for cmd := range everyCommand(root) {
		var b strings.Builder
		b.WriteString(cmp.Or(cmd.Long, cmd.Short) + "\n\n# EXIT STATUS\n")
		for _, c := range exitCodes(cmd) {
			b.WriteString("**" + c.code + "**\n: " + c.meaning + "\n\n")
		}
		cmd.Long = b.String() // the library copies it into the page
	}
	epoch, _ := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	date := time.Unix(epoch, 0).UTC()
	header := &doc.GenManHeader{Section: "1", Date: &date, Source: "etcd-kms-proxy", Manual: "etcd-kms-proxy"}
	if err := doc.GenManTree(root, header, dir); err != nil {
		t.Fatal(err)
	}
	for cmd := range everyCommand(root) {
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + ".1"
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if text := strings.ReplaceAll(string(page), `\`, ""); !strings.Contains(text, cmd.Short) {
			t.Errorf("%s does not say %q", name, cmd.Short)
		}
		for _, c := range exitCodes(cmd) {
			if _, status, _ := strings.Cut(string(page), ".SH EXIT STATUS"); !strings.Contains(status, c.code) || !strings.Contains(status, c.meaning) {
				t.Errorf("%s does not explain exit code %s", name, c.code)
			}
		}
	}
}

// TestCompletions makes the scripts of shell completion, and those of the release with -completion.
func TestCompletions(t *testing.T) {
	dir := *completionFlag
	if dir == "" {
		dir = t.TempDir()
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out, err := os.Create(filepath.Join(dir, shell))
		if err != nil {
			t.Fatal(err)
		}
		code := run([]string{"completion", shell}, out, os.Stderr)
		if err := out.Close(); err != nil || code != 0 {
			t.Errorf("completion %s: exit code %d, %v", shell, code, err)
		}
		if info, err := os.Stat(out.Name()); err != nil || info.Size() == 0 {
			t.Errorf("completion %s is empty", shell)
		}
	}
}

func disableAutoGenTag(root *cobra.Command) {
	for cmd := range everyCommand(root) {
		cmd.DisableAutoGenTag = true // it names the day of the build
	}
}

// everyCommand yields cmd and all commands below it that --help lists.
func everyCommand(cmd *cobra.Command) func(yield func(*cobra.Command) bool) {
	return func(yield func(*cobra.Command) bool) {
		if !yield(cmd) {
			return
		}
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() {
				for c := range everyCommand(sub) {
					if !yield(c) {
						return
					}
				}
			}
		}
	}
}
