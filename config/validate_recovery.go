package config

import (
	"fmt"
	"regexp"
	"slices"
)

// copyName is a provider's name that can be a part of a domain name, as it is in the annotations
// that hold recovery copies.
var copyName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

const (
	copyNameText = "%q cannot be in the name of an annotation, where recovery copies are stored"
	copyNameHint = "use only lower-case letters, digits, - and ."
)

// recovery checks the recovery providers of rules[i].
func (v *validator) recovery(at string, i int, rules []Rule, defined []string) {
	r := &rules[i]
	if r.RecoveryRequired && len(r.Recovery) == 0 {
		v.report(at+".recoveryRequired", "name providers in recovery, or remove it", "has no effect without recovery")
	}
	if len(r.Recovery) > 0 && r.WriteWith == Plaintext {
		v.report(at+".recovery", "name them in readWith, whose providers unwrap recovery copies too", "has no effect with writeWith: plaintext, since there are no seeds to copy")
		return
	}
	for j, name := range r.Recovery {
		at := fmt.Sprintf("%s.recovery[%d]", at, j)
		switch {
		case name == Plaintext:
			v.report(at, undefinedHint(defined[1:]), "%q is not a KMS provider", name)
		case !slices.Contains(defined, name):
			v.report(at, undefinedHint(defined[1:]), "no KMS provider is called %q", name)
		case name == r.WriteWith:
			v.report(at, "name another provider, with another key", "%q is the provider of writeWith itself", name)
		case slices.Contains(r.Recovery[:j], name):
			v.report(at, "remove one of them", "%q is in the list twice", name)
		case !copyName.MatchString(name):
			v.report(at, copyNameHint+"; a second entry under kms may name the same key", copyNameText, name)
		}
	}
	for first := range rules[:i] {
		o := &rules[first]
		if o.WriteWith != r.WriteWith || r.WriteWith == Plaintext {
			continue
		}
		if !slices.Equal(slices.Sorted(slices.Values(o.Recovery)), slices.Sorted(slices.Values(r.Recovery))) || o.RecoveryRequired != r.RecoveryRequired {
			v.report(at, "give both the same recovery and recoveryRequired, or a second entry under kms to one of them",
				"writes with %q as rules[%d] does, and has another recovery: the seeds are the same", r.WriteWith, first)
		}
		break
	}
}
