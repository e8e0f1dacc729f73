// Package settling decides whether to follow a key ID that a KMS names again. Each change means a
// new DEK seed, and with re-encryption that every value is written again, so that a KMS that
// alternates between two key IDs must not be followed.
package settling

import "time"

const (
	memory    = 24 * time.Hour // how long a former key ID is remembered
	maxFormer = 64             // key IDs
	// hold is how long the KMS must name a former key ID without a break until it is used again.
	hold = time.Hour
)

// KeyIDs are the key IDs of one KMS key. The zero value is ready. It is not safe for concurrent
// use.
type KeyIDs struct {
	former map[string]time.Time // and until when they were in use
	// the former key ID that the KMS names now; "" if it names the one in use
	back     string
	since    time.Time // when the KMS began to name it
	reported time.Time
}

// Held reports whether keyID is a former key ID that is not used again yet.
func (k *KeyIDs) Held(keyID string) bool { return k.back != "" && k.back == keyID }

// Decide returns the key ID to use, now that the KMS names one and inUse is in use, or "". That is
// the named one, unless it was in use a short time ago. began is true if the KMS begins to name a
// former key ID, and report if nothing was reported of that for an hour.
func (k *KeyIDs) Decide(inUse, named string, now time.Time) (use string, began, report bool) {
	if inUse == "" || named == inUse {
		k.back = ""
		return named, false, false
	}
	if until, ok := k.former[named]; !ok || now.Sub(until) >= memory {
		k.Adopt(inUse, named, now)
		return named, false, false
	}
	if began = k.back != named; began {
		k.back, k.since = named, now
		if report = now.Sub(k.reported) >= hold; report {
			k.reported = now
		}
	}
	if now.Sub(k.since) >= hold {
		k.Adopt(inUse, named, now)
		return named, began, report
	}
	return inUse, began, report
}

// Adopt notes that keyID replaces the key ID inUse, which may be "".
func (k *KeyIDs) Adopt(inUse, keyID string, now time.Time) {
	if inUse != "" && inUse != keyID {
		if len(k.former) >= maxFormer || k.former == nil {
			k.former = make(map[string]time.Time)
		}
		k.former[inUse] = now
	}
	delete(k.former, keyID)
	k.back = ""
}
