package kubernetes

import (
	"fmt"
	"slices"
	"testing"
)

// TestKinds: each resource has a kind, but for those that are not told by one.
func TestKinds(t *testing.T) {
	seen := 0
	for group, resources := range builtin {
		for _, resource := range resources {
			g := groupResource{group, resource}
			kind, ok := kinds[storedAs(g)[:len(storedAs(g))-1]]
			if untold := slices.Contains(grouped, group) || resource == "endpoints"; ok == untold {
				t.Errorf("%s: kind %q", g, kind)
			}
			if ok {
				seen++
			}
		}
	}
	if seen != len(kinds) {
		t.Errorf("%d kinds are of no resource", len(kinds)-seen)
	}
	for prefix, want := range map[string]string{
		"/registry/secrets/": "[Secret] true", "/registry/secrets/kube-system/": "[Secret] true", "/registry/pods/secrets/": "[Pod] true", "/k/services/specs/": "[Service] true",
		"/registry/minions/": "[Node] true", "/registry/services/": "[] false", "/registry/services/endpoints/": "[] false", "/registry/example.com/secretes/": "[] false", "/app/": "[] false",
	} {
		if known, all := Kinds(prefix); fmt.Sprint(known, all) != want {
			t.Errorf("%s: %v %v, want %s", prefix, known, all, want)
		}
	}
	for _, prefix := range []string{"", "/", "/registry/"} {
		if known, all := Kinds(prefix); len(known) != len(kinds) || all {
			t.Errorf("%q: %d kinds, %v", prefix, len(known), all)
		}
	}
}
