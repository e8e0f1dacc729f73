package harness

import "strings"

// SameRules returns how many proxies a report of the status command lists with the rules of the
// configuration that it was given.
func SameRules(report string) int {
	n := 0
	for line := range strings.Lines(report) {
		if strings.HasSuffix(strings.TrimRight(line, "\n"), "  same") {
			n++
		}
	}
	return n
}
