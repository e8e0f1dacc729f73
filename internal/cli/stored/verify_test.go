package stored

import (
	"fmt"
	"slices"
	"testing"

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
