package stored

import (
	"bytes"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/drill"
)

// TestDrillReportState checks what the report says about a key that is left and unwrapped nothing.
func TestDrillReportState(t *testing.T) {
	t.Parallel()
	group := func(c drill.Count, copies string) *drillReport {
		return &drillReport{
			Count: c, Left: []drillKey{{Name: "safe", OK: true}},
			Rules: []drill.Rule{{Prefix: "/a/", Groups: []drill.Group{{Count: c, Copies: map[string]int64{copies: c.Values}}}}},
		}
	}
	for _, test := range []struct {
		report *drillReport
		want   string
	}{
		{group(drill.Count{Values: 3, Missing: 3}, "safe"), "unwrapped no recovery copy"},
		{group(drill.Count{Values: 3, Missing: 3}, "other"), "not needed"},
		{group(drill.Count{Values: 3, Readable: 3}, "safe"), "not needed"},
	} {
		var out bytes.Buffer
		test.report.text(&out)
		if !strings.Contains(out.String(), "\nsafe  "+test.want) {
			t.Errorf("it does not say %q: %s", test.want, &out)
		}
	}
}

// TestDrillReportOfOneValue checks the report about one value, of whose keys none is left.
func TestDrillReportOfOneValue(t *testing.T) {
	t.Parallel()
	lost := drill.Count{Values: 1, Missing: 1}
	reasons := []drill.Reason{{Values: 1, Example: "/a/b", Text: "gone"}}
	var out bytes.Buffer
	(&drillReport{Count: lost, Rules: []drill.Rule{{Prefix: "/a/", Groups: []drill.Group{{Count: lost, Reasons: reasons}}}}}).text(&out)
	for _, want := range []string{"\n1 value under \"/a/\", for example /a/b: gone\n", "\nno provider is left\n", "\nFAILED: of 1 value that was tried, 0 are readable"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in %s", want, &out)
		}
	}
}
