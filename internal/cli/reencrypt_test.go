package cli

import (
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
)

// TestReencryptUsage: what cannot be meant is refused before anything is read.
func TestReencryptUsage(t *testing.T) {
	t.Parallel()
	for _, args := range []string{
		"--workers 0", "--txn-keys 0", "--passes 0", "--rate -1", "--watch --dry-run", "--watch --no-wait", "--watch --interval 1ms", "--watch --encrypt-plaintext", "--output yaml", "key",
	} {
		var out, errs strings.Builder
		if code := run(append([]string{"reencrypt", "--config", "/does/not/exist"}, strings.Fields(args)...), &out, &errs); code != command.ExitUsage || !strings.HasPrefix(errs.String(), "error: ") {
			t.Errorf("%s: exit code %d: %s", args, code, errs.String())
		}
	}
}
