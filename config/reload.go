package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// NeedsRestart names the blocks of next that differ from running and that a reload does not apply.
// The answer is empty if a reload applies everything.
func NeedsRestart(running, next *Config) []string {
	var blocks []string
	for _, b := range []struct {
		name string
		a, b any
	}{
		{"listeners", withClients(running.Listeners, next.Listeners), next.Listeners},
		{"etcd", running.Etcd, next.Etcd},
		{"kms", running.KMS, next.KMS},
		{"cache", running.Cache, next.Cache},
		{"coordination", running.Coordination, next.Coordination},
		{"admin", running.Admin, next.Admin},
		{"audit", running.Audit, next.Audit},
		{"log.format", running.Log.Format, next.Log.Format},
	} {
		if !reflect.DeepEqual(b.a, b.b) {
			blocks = append(blocks, b.name)
		}
	}
	return blocks
}

// SameListener returns the index in next of the listener that is at index i of running, or -1 if
// there is none that a reload gives its client lists to: it has another address, or takes no client
// certificates.
func SameListener(running, next []Listener, i int) int {
	verifies := func(l Listener) bool { return l.TLS != nil && l.TLS.ClientCAFile != "" }
	l := running[i]
	same := func(n Listener) bool { return n.Address == l.Address && verifies(n) }
	switch {
	case !verifies(l):
		return -1
	case i < len(next) && same(next[i]):
		return i
	case strings.HasSuffix(l.Address, ":0"): // such an address is not one listener's alone
		return -1
	}
	return slices.IndexFunc(next, same)
}

// withClients returns running with the client lists that next gives its listeners.
func withClients(running, next []Listener) []Listener {
	all := slices.Clone(running)
	for i := range all {
		if j := SameListener(running, next, i); j >= 0 {
			all[i].AllowedClients, all[i].CiphertextClients = next[j].AllowedClients, next[j].CiphertextClients
		}
	}
	return all
}

// Weakens says how the rules of next protect keys less than those of running do, a sentence each:
// where values that were encrypted would be written as plaintext, where they could not be read any
// more, and where plaintext that was refused would be handed on. The answer is empty if they
// protect them at least as well.
func Weakens(running, next []Rule) []string {
	// Between them, the prefixes of both cut all keys into regions, in each of which one rule of
	// each holds.
	regions := make(map[string]bool)
	for _, r := range slices.Concat(running, next) {
		regions[r.Prefix] = true
	}
	var found []string
	for prefix := range regions {
		was, now := ruleFor(running, prefix), ruleFor(next, prefix)
		if was == nil {
			continue
		}
		sealed := was.WriteWith != Plaintext
		switch {
		case sealed && now == nil:
			found = append(found, fmt.Sprintf("keys below %q would have no rule: their values were encrypted with %q", prefix, was.WriteWith))
		case sealed && now.WriteWith == Plaintext:
			found = append(found, fmt.Sprintf("keys below %q would be written as plaintext: their values were encrypted with %q", prefix, was.WriteWith))
		case sealed && now.WriteWith != was.WriteWith && !slices.Contains(now.ReadWith, was.WriteWith):
			found = append(found, fmt.Sprintf("keys below %q would be encrypted with %q: their values are encrypted with %q, which is not in readWith", prefix, now.WriteWith, was.WriteWith))
		case now != nil && !was.AllowPlaintextReads && now.AllowPlaintextReads:
			found = append(found, fmt.Sprintf("keys below %q would allow plaintext reads, which are refused now", prefix))
		}
	}
	slices.Sort(found)
	return found
}

// ruleFor returns the rule with the longest prefix of key, or nil.
func ruleFor(rules []Rule, key string) *Rule {
	var best *Rule
	for i, r := range rules {
		if strings.HasPrefix(key, r.Prefix) && (best == nil || len(r.Prefix) > len(best.Prefix)) {
			best = &rules[i]
		}
	}
	return best
}
