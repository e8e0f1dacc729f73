package alibaba

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	fetchTime = 15 * time.Second // of one attempt to fetch a session
	// refreshAhead: least time before a session's end, if it is so long, when the next is fetched
	refreshAhead = 5 * time.Minute
	minRetry     = time.Second // after a failed fetch; doubled up to maxRetry, with jitter
	maxRetry     = 15 * time.Second
	renewPause   = 5 * time.Second // between fetches because of a rejection
)

var errClosed = &kmsclient.Error{Reason: kmsclient.Unreachable, Detail: "the backend was closed"}

// session is a credential that ends.
type session struct {
	cred    credential
	expires time.Time
}

// sessionSource keeps a session fresh. A fetch runs on a goroutine and a context of its own, never
// more than one at a time; it is begun by the first call that finds it due, and only calls that
// find no session that is valid wait for it.
type sessionSource struct {
	fetch func(context.Context) (session, error) // the error is an *kmsclient.Error
	// the files that fetch reads: a change ends the pause after a failure
	reads func() []string
	done  func() // called by close, at its end
	// problem says why the newest files are not in use, other than read errors; nil if they are
	// files
	problem func() error
	logger  *slog.Logger
	now     func() time.Time

	ctx     context.Context // ends with close
	stop    context.CancelFunc
	running sync.WaitGroup

	mu       sync.Mutex
	last     session
	due      time.Time     // when the next is fetched
	flight   chan struct{} // closed at the end of the current fetch; nil without one
	failure  error         // of the last fetch; nil if it was good
	failures int           // in a row
	retryAt  time.Time
	stamp    string    // of the files, when the fetch that failed began
	renewAt  time.Time // when the next rejection may begin a fetch
	closed   bool
}

func newSessionSource(logger *slog.Logger, fetch func(context.Context) (session, error), reads func() []string, done func()) *sessionSource {
	s := &sessionSource{fetch: fetch, reads: reads, done: done, logger: logger, now: time.Now}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

func (s *sessionSource) get(ctx context.Context) (credential, error) {
	for {
		s.mu.Lock()
		now := s.now()
		valid := now.Before(s.last.expires)
		if !valid || !now.Before(s.due) {
			s.begin(now)
		}
		cred, flight, failure := s.last.cred, s.flight, s.failure
		s.mu.Unlock()
		switch {
		case valid:
			return cred, nil
		case flight == nil:
			return credential{}, failure
		}
		select {
		case <-flight:
		case <-ctx.Done():
			return credential{}, ctx.Err()
		}
	}
}

func (s *sessionSource) renew(ctx context.Context, rejected credential) (credential, error) {
	s.mu.Lock()
	now := s.now()
	if s.last.cred != rejected && now.Before(s.last.expires) {
		defer s.mu.Unlock()
		return s.last.cred, nil
	}
	if s.flight == nil && !now.Before(s.renewAt) {
		s.renewAt = now.Add(renewPause)
		s.begin(now)
	}
	flight := s.flight
	s.mu.Unlock()
	if flight == nil {
		return rejected, nil
	}
	select {
	case <-flight:
	case <-ctx.Done():
		return credential{}, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.cred, s.failure
}

func (s *sessionSource) expires() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.expires
}

func (s *sessionSource) late() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last.expires.IsZero() {
		return false
	}
	return s.failure != nil || !s.now().Before(s.due.Add(s.last.expires.Sub(s.due)/2))
}

func (s *sessionSource) close() {
	s.mu.Lock()
	s.closed, s.last, s.failure = true, session{}, errClosed
	s.mu.Unlock()
	s.stop()
	s.running.Wait()
	s.done()
}

// begin begins a fetch, unless there is one, or the last has just failed. s.mu is held.
func (s *sessionSource) begin(now time.Time) {
	if s.flight != nil || s.closed {
		return
	}
	stamp := stampOf(s.reads())
	if s.failure != nil && now.Before(s.retryAt) && stamp == s.stamp {
		return
	}
	s.stamp, s.flight = stamp, make(chan struct{})
	s.running.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, fetchTime)
		defer cancel()
		next, err := s.fetch(ctx)
		s.end(next, err)
	})
}

// end takes the result of a fetch.
func (s *sessionSource) end(next session, err error) {
	s.mu.Lock()
	now, before := s.now(), s.failures
	if err == nil && !now.Before(next.expires) {
		err = &kmsclient.Error{
			Reason: kmsclient.Unreachable, Detail: fmt.Sprintf("the session that was given ended at %s: compare the clocks", next.expires.Format(time.RFC3339)),
		}
	}
	switch {
	case s.closed: // it is no longer needed
	case err != nil:
		s.failure, s.failures = err, s.failures+1
		pause := min(minRetry<<min(before, 10), maxRetry)
		s.retryAt = now.Add(pause/2 + rand.N(pause/2)) //nolint:gosec // jitter is no secret
	default:
		left := next.expires.Sub(now)
		s.last, s.failure, s.failures = next, nil, 0
		s.due = next.expires.Add(-max(left/6, min(refreshAhead, left/2)))
	}
	closed, expires := s.closed, s.last.expires
	close(s.flight)
	s.flight = nil
	s.mu.Unlock()
	switch {
	case closed:
	case err != nil && before == 0:
		s.logger.Warn("alibaba credentials cannot be refreshed, the last good ones stay in use until they expire", "error", err, "expires", expires)
	case err == nil && before > 0:
		s.logger.Info("alibaba credentials are refreshed again", "expires", expires)
	}
}

// stampOf returns a text that is another one when a file was replaced or written to.
func stampOf(files []string) string {
	var b strings.Builder
	for _, name := range files {
		if name == "" {
			continue
		}
		if info, err := os.Stat(name); err == nil {
			fmt.Fprintf(&b, "%d %d;", info.ModTime().UnixNano(), info.Size())
		} else {
			b.WriteString("-;")
		}
	}
	return b.String()
}

// sessionResponse is what a service gives as a session.
type sessionResponse struct {
	ID         string `json:"AccessKeyId"`
	Secret     string `json:"AccessKeySecret"`
	Token      string `json:"SecurityToken"`
	Expiration string
}

// session checks the answer. The error does not quote it.
func (a sessionResponse) session(source string) (session, error) {
	for _, value := range []string{a.ID, a.Secret, a.Token} {
		if value == "" || len(value) > maxCredentialFile || !isVisible(value) {
			return session{}, errors.New("the answer lacks a part of the credentials, or one is malformed")
		}
	}
	expires := parseTime(a.Expiration)
	if expires.IsZero() {
		return session{}, errors.New("the answer does not say when the credentials expire")
	}
	return session{cred: credential{id: a.ID, secret: a.Secret, token: a.Token, source: source}, expires: expires}, nil
}
