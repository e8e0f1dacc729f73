package alibaba

import (
	"regexp"
	"slices"
	"strings"
)

const (
	maxMessage = 200 // bytes of a message
	maxWord    = 20  // letters; what is secret in a request is longer
)

var (
	wordPattern = regexp.MustCompile(`^[("']*[A-Za-z]+([-'][A-Za-z]+)*[)"',.;:!?]*$`)
	// idPattern is the id of a key, which is no secret: "key-…" or a UUID.
	idPattern = regexp.MustCompile(`^["']?(key-[a-z0-9]{8,40}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})["',.;:]*$`)
)

// safeMessage returns a message of the vendor's, to be added to a sentence, or "" if it could hold
// anything secret: some messages quote what was signed, or a parameter. Only short words of letters
// and ids of keys are let through: access keys, tokens, signatures and seeds are longer than such a
// word. Without it, the operator could not find out why the KMS denies a caller a certain key.
func (r *remote) safeMessage(message string) string {
	message = strings.TrimSpace(message)
	if message == "" || len(message) > maxMessage {
		return ""
	}
	if r.keyID != "" {
		message = strings.ReplaceAll(message, r.keyID, "(key)")
	}
	for _, word := range strings.Fields(message) {
		if !idPattern.MatchString(word) && (len(word) > maxWord || !wordPattern.MatchString(word)) {
			return ""
		}
	}
	if slices.ContainsFunc(r.hidden, func(h string) bool { return h != "" && strings.Contains(message, h) }) {
		return ""
	}
	return "; " + r.name + " says: " + strings.Join(strings.Fields(message), " ")
}
