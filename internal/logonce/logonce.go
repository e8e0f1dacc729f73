// Package logonce keeps repeated messages out of a log. It logs nothing: it tells its
// callers whether a message is new. Messages that are limited by time alone use [golang.org/x/time/rate.Sometimes] directly.
package logonce

import (
	"sync"

	lru "github.com/hashicorp/golang-lru/v2"
)

// Keys tells the first use of a key from repeated ones. It remembers a limited number of keys, the
// least recently used of which it forgets first. It is safe for concurrent use.
type Keys struct{ seen *lru.Cache[string, struct{}] }

// NewKeys returns Keys that remember size keys. It panics if size is not positive.
func NewKeys(size int) *Keys {
	seen, err := lru.New[string, struct{}](size)
	if err != nil {
		panic("logonce: " + err.Error())
	}
	return &Keys{seen}
}

// First reports whether key was not used before, and notes its use.
func (k *Keys) First(key string) bool {
	seen, _ := k.seen.ContainsOrAdd(key, struct{}{})
	if seen {
		_, _ = k.seen.Get(key) // it becomes the most recently used
	}
	return !seen
}

// State is the last thing that was logged about something whose state changes, such as an error.
// The zero value is the good state, "". It is safe for concurrent use.
type State struct {
	mu   sync.Mutex
	last string
}

// Changed reports whether state differs from that of the last call, and notes it.
func (s *State) Changed(state string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.last != state
	s.last = state
	return changed
}

// Set is a set of states that begin and end, such as warnings. The zero value is empty. It is not
// safe for concurrent use.
type Set struct{ last map[string]bool }

// Update replaces the set and returns what has begun and what has ended since the last call, in the
// order of now and in no order.
func (s *Set) Update(now ...string) (begun, ended []string) {
	next := make(map[string]bool, len(now))
	for _, state := range now {
		if !s.last[state] && !next[state] {
			begun = append(begun, state)
		}
		next[state] = true
	}
	for state := range s.last {
		if !next[state] {
			ended = append(ended, state)
		}
	}
	s.last = next
	return begun, ended
}
