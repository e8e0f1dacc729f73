package differential

import (
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const provider = "local"

// ruleSet is one configuration of the proxy under test.
type ruleSet struct {
	name  string
	rules []harness.Rule
}

func strict() *bool { no := false; return &no }

// ruleSets: a rule on everything, on about half of the keys (with a hole in it, and one strict prefix), on nothing.
var ruleSets = []ruleSet{
	{"all", []harness.Rule{{Prefix: "", WriteWith: provider}}},
	{"half", []harness.Rule{
		{Prefix: "/s/", WriteWith: provider},
		{Prefix: "/s/p/", WriteWith: "plaintext"},
		{Prefix: "/t/", WriteWith: provider, AllowPlaintextReads: strict()},
	}},
	{"none", nil},
}

// sealed reports whether etcd has to hold ciphertext for key: the longest prefix decides.
func (r ruleSet) sealed(key string) bool {
	best, result := -1, false
	for _, rule := range r.rules {
		if strings.HasPrefix(key, rule.Prefix) && len(rule.Prefix) > best {
			best, result = len(rule.Prefix), rule.WriteWith != "plaintext"
		}
	}
	return result
}

// prefixEnd is the range end that makes a range of all keys with the prefix; "\x00" is etcd's word for "to the end".
func prefixEnd(prefix string) string {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] < 0xff {
			return prefix[:i] + string(prefix[i]+1)
		}
	}
	return "\x00"
}
