package command

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// TestErrorsArePrintable: whatever an error holds, it is one line and its hint another.
func TestErrorsArePrintable(t *testing.T) {
	for name, err := range map[string]error{
		"problem": problem.Problem{Path: clitest.Hostile, Line: 7, Text: clitest.Hostile, Hint: clitest.Hostile},
		"joined":  errors.Join(errors.New(clitest.Hostile), problem.New(clitest.Hostile, "%s", clitest.Hostile)),
		"usage":   Usage(clitest.Hostile, "%s", clitest.Hostile),
	} {
		var b bytes.Buffer
		Failure(err).Print(&b)
		clitest.CheckPrintable(t, name, b.String())
		if lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n"); len(lines) > 2 || !strings.HasPrefix(lines[0], "error: ") {
			t.Errorf("%s: %q", name, lines)
		}
	}
}
