package stored

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

func TestKindsOf(t *testing.T) {
	rules := func(sealed []string, clear ...string) *inventory.Rules {
		var all []inventory.Rule
		for _, p := range sealed {
			all = append(all, inventory.Rule{Prefix: p, WriteWith: "main"})
		}
		for _, p := range clear {
			all = append(all, inventory.Rule{Prefix: p, WriteWith: inventory.Plaintext})
		}
		return inventory.NewRules(all)
	}
	const secrets, pods, custom = "/registry/secrets/", "/registry/pods/", "/registry/example.com/widgets/"
	for _, c := range []struct {
		rules *inventory.Rules
		given []string
		want  string
	}{
		{rules([]string{secrets, pods}), nil, "[Pod Secret] []"},
		{rules([]string{secrets, pods}), []string{"Secret"}, "[Secret] [/registry/pods/]"},
		{rules([]string{secrets, custom}), nil, "[Secret] [/registry/example.com/widgets/]"},
		{rules([]string{secrets, custom}), []string{"Secret", "Widget"}, "[Secret Widget] []"},
		{rules([]string{secrets}, pods), nil, "[Secret] []"},
		{rules([]string{secrets}, secrets+"public/"), nil, "[Secret] []"},
	} {
		kinds, shapeless := kindsOf(c.rules, c.given)
		if got := fmt.Sprint(kinds, shapeless); got != c.want {
			t.Errorf("%s, want %s", got, c.want)
		}
	}
	kinds, shapeless := kindsOf(rules([]string{"/registry/"}, pods), nil)
	if !slices.Contains(kinds, "Secret") || slices.Contains(kinds, "Pod") || len(shapeless) != 1 {
		t.Errorf("a rule for everything but pods: %v, %v", kinds, shapeless)
	}
}

// TestVerifyText checks that a reason is printed once for all values that have it, with the count,
// and that --list prints each value.
func TestVerifyText(t *testing.T) {
	t.Parallel()
	r := newVerifyReport(newUndecided(inventory.NewRules(nil)))
	for i := range 5 {
		r.found(etcdfile.Finding{File: "etcd", Place: etcdfile.Live, Key: fmt.Sprint("/a/", i), Revision: int64(i) + 1, Offset: -1, Why: "it is plaintext"})
		r.addUndecrypted(etcdfile.Finding{File: "etcd", Place: etcdfile.Live, Key: fmt.Sprint("/b/", i), Offset: -1, Why: "the KMS is away"}, 1)
	}
	r.found(etcdfile.Finding{File: "db", Place: etcdfile.History, Key: "/c", Offset: 7, Why: "it is plaintext"})
	r.addUndecrypted(etcdfile.Finding{File: "db", Place: etcdfile.Live, Key: "/d", Offset: -1, Why: "of many"}, 40)
	for i := range textReasons + 1 {
		r.found(etcdfile.Finding{File: "wal", Place: etcdfile.Live, Key: "/e", Offset: -1, Why: fmt.Sprint("reason ", i)})
	}
	var short, long bytes.Buffer
	r.text(&short, false)
	r.text(&long, true)
	want := `etcd: 5 values were not decrypted: the KMS is away
  live "/b/0"
  live "/b/1"
  live "/b/2"
  and 2 more, see --list
db: 40 values were not decrypted: of many
  live "/d"
  and 39 more, see --list
etcd: 5 findings: it is plaintext
  live "/a/0" revision 1
  live "/a/1" revision 2
  live "/a/2" revision 3
  and 2 more, see --list
db: 1 finding: it is plaintext
  history "/c" byte 7
wal: 1 finding: reason 0
`
	if !strings.HasPrefix(short.String(), want) || !strings.Contains(short.String(), "\nwal: 1 more reason, see --list\n") || strings.Contains(short.String(), "reason 20") {
		t.Errorf("%s\nwant %s", &short, want)
	}
	if n := strings.Count(long.String(), ": it is plaintext\n"); n != 6 || !strings.Contains(long.String(), "\netcd: live \"/a/4\" revision 5: it is plaintext\n") {
		t.Errorf("--list names %d: %s", n, &long)
	}
	if n := strings.Count(long.String(), " was not decrypted: the KMS is away\n"); n != 5 {
		t.Errorf("--list names %d: %s", n, &long)
	}
}
