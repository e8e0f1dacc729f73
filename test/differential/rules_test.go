package differential

import (
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const provider = "local"

// ruleSet is one configuration of the tested proxy.
type ruleSet struct {
	name  string
	rules []harness.Rule
}

func strict() *bool { no := false; return &no }

// ruleSets are: a rule for all keys; rules for about half of them, with a gap and a strict rule; no
// rule.
var ruleSets = []ruleSet{
	{"all", []harness.Rule{{Prefix: "", WriteWith: provider}}},
	{"half", []harness.Rule{
		{Prefix: "/s/", WriteWith: provider},
		{Prefix: "/s/p/", WriteWith: "plaintext"},
		{Prefix: "/t/", WriteWith: provider, AllowPlaintextReads: strict()},
	}},
	{"none", nil},
}

// sealed reports whether etcd must store ciphertext for key: the longest prefix decides.
func (r ruleSet) sealed(key string) bool {
	best, result := -1, false
	for _, rule := range r.rules {
		if strings.HasPrefix(key, rule.Prefix) && len(rule.Prefix) > best {
			best, result = len(rule.Prefix), rule.WriteWith != "plaintext"
		}
	}
	return result
}

// prefixEnd returns the range end for all keys with the prefix; "\x00" is etcd's range end for all
// following keys.
func prefixEnd(prefix string) string {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] < 0xff {
			return prefix[:i] + string(prefix[i]+1)
		}
	}
	return "\x00"
}
