package proxy

import "sync"

// firsts tells what comes for the first time, so that what comes again and again is logged once. It forgets everything when it is full: clients
// choose what comes.
type firsts struct {
	mu   sync.Mutex
	seen map[string]bool
}

const maxFirsts = 1024

func (f *firsts) first(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen[what] {
		return false
	}
	if f.seen == nil || len(f.seen) >= maxFirsts {
		f.seen = make(map[string]bool)
	}
	f.seen[what] = true
	return true
}
