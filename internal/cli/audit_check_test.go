package cli

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// TestKMSCheckIsAudited: the calls of the check are in the commands' log, with the KMS' own IDs of
// the requests, and no more and no less of them than the KMS saw.
func TestKMSCheckIsAudited(t *testing.T) {
	double, d := clitest.NewDouble(t, kmsdouble.Config{}), clitest.NewDir(t)
	edits := append(d.OnAlibaba(t, double, clitest.FileCredentials), "kind: ", "audit: {path: audit.jsonl}\nkind: ")
	edits[1] = strings.Replace(edits[1], kmsdouble.DefaultKeyID, kmsdouble.DefaultAlias, 1)
	path := d.Config(t, edits...)
	execute(t, "kms", "check", "--config", path).want(t, 0)
	double.SetFault(denying("Decrypt"))
	execute(t, "kms", "check", "--config", path).want(t, 1)
	double.SetFault(nil)
	execute(t, "kms", "check", "--config", path, "--policy").want(t, 0)
	var got, ids, seen []string
	for _, r := range d.AuditLogAt(t, "audit.commands.jsonl") {
		got = append(got, fmt.Sprint(r["event"], " ", r["provider"], " ", r["operation"], " ", r["class"]))
		ids = append(ids, fmt.Sprint(r["requestID"]))
	}
	round := func(last string) []string {
		return []string{"kms dev DescribeKey ok", "kms dev Status ok", "kms dev GenerateDataKey ok", "kms dev Decrypt " + last}
	}
	if want := slices.Concat(round("ok"), round("denied"), []string{"kms dev DescribeKey ok"}); !slices.Equal(got, want) {
		t.Errorf("records %q,\nwant %q", got, want)
	}
	for _, r := range double.Records() {
		seen = append(seen, r.RequestID)
	}
	if !slices.Equal(ids, seen) {
		t.Errorf("request IDs %q, the KMS' own %q", ids, seen)
	}
	execute(t, "audit", "verify", d.Path("audit.commands.jsonl")).want(t, 0)

	// Without the log it still checks, and says once what is missing.
	defer d.BlockAt(t, "audit.commands.jsonl")()
	r := execute(t, "kms", "check", "--config", path)
	r.want(t, 0, "warning: calls of the KMS")
	if n := strings.Count(r.stderr, "warning: "); n != 1 || !strings.Contains(r.stdout, "dev (alibaba): ok") {
		t.Errorf("%d warnings: %s%s", n, r.stderr, r.stdout)
	}
}
