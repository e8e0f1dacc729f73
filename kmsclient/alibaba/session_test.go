package alibaba

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// issuer gives sessions that are numbered, in a bubble.
type issuer struct {
	fetches atomic.Int64
	running atomic.Int64
	life    time.Duration
	takes   time.Duration
	err     error
}

func (i *issuer) fetch(ctx context.Context) (session, error) {
	n := i.fetches.Add(1)
	if i.running.Add(1) > 1 {
		panic("two fetches at once")
	}
	defer i.running.Add(-1)
	select {
	case <-time.After(i.takes):
	case <-ctx.Done():
		return session{}, &kmsclient.Error{Reason: kmsclient.Unreachable, Detail: "ended"}
	}
	if i.err != nil {
		return session{}, i.err
	}
	return session{cred: credential{id: fmt.Sprint("session-", n)}, expires: time.Now().Add(i.life)}, nil
}

func (i *issuer) source(t *testing.T, files ...string) (*sessionSource, *safeBuffer) {
	t.Helper()
	logs := &safeBuffer{}
	s := newSessionSource(slog.New(slog.NewTextHandler(logs, nil)), i.fetch, func() []string { return files }, func() {})
	t.Cleanup(s.close)
	return s, logs
}

// want fails the test unless get gives the n-th session at once.
func (s *sessionSource) want(t *testing.T, when string, n int) {
	t.Helper()
	start := time.Now()
	c, err := s.get(t.Context())
	if want := fmt.Sprint("session-", n); err != nil || c.id != want || time.Since(start) != 0 {
		t.Errorf("%s: %q, %v after %v; want %s at once", when, c.id, err, time.Since(start), want)
	}
}

// TestRefreshAhead: while a session is valid nobody waits for the next, which is there before a
// sixth of its life or five minutes are left.
func TestRefreshAhead(t *testing.T) {
	for life, ahead := range map[time.Duration]time.Duration{
		15 * time.Minute: 5 * time.Minute, time.Hour: 10 * time.Minute, 12 * time.Hour: 2 * time.Hour, 8 * time.Minute: 4 * time.Minute,
	} {
		synctest.Test(t, func(t *testing.T) {
			i := &issuer{life: life, takes: time.Second}
			s, logs := i.source(t)
			start := time.Now()
			if c, err := s.get(t.Context()); err != nil || c.id != "session-1" || time.Since(start) != time.Second {
				t.Fatalf("first: %v, %v after %v", c.id, err, time.Since(start))
			}
			time.Sleep(life - ahead - time.Second)
			if s.late() {
				t.Errorf("life %v: late before it is due", life)
			}
			s.want(t, "before it is due", 1)
			if n := i.fetches.Load(); n != 1 {
				t.Errorf("life %v: %d fetches before it is due", life, n)
			}
			time.Sleep(time.Second)
			for range 10 {
				s.want(t, "when it is due", 1)
			}
			time.Sleep(2 * time.Second)
			s.want(t, "after the fetch", 2)
			if n := i.fetches.Load(); n != 2 || !s.expires().Equal(start.Add(life-ahead+2*time.Second+life)) {
				t.Errorf("life %v: %d fetches, expires %v after the start", life, n, s.expires().Sub(start))
			}
			if logs.String() != "" {
				t.Errorf("logged %s", logs)
			}
			time.Sleep(life - ahead - 2*time.Second + ahead/2 - time.Second)
			if s.late() {
				t.Errorf("life %v: late before half of the time for the refresh is over, without a failure", life)
			}
			time.Sleep(3 * time.Second) // nobody asked for it
			if !s.late() {
				t.Errorf("life %v: not late although nobody has renewed it", life)
			}
		})
	}
}

// TestRefreshFails keeps the last good session until it ends, asks ever more rarely, and says so
// once.
func TestRefreshFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{life: time.Hour}
		s, logs := i.source(t)
		if _, err := s.get(t.Context()); err != nil {
			t.Fatal(err)
		}
		i.err = &kmsclient.Error{Reason: kmsclient.Unreachable, Detail: "down"}
		for range 3599 {
			time.Sleep(time.Second)
			synctest.Wait()
			s.want(t, "while the refresh fails", 1)
			synctest.Wait() // for the fetch that this has begun
			if late := i.fetches.Load() > 1; s.late() != late {
				t.Fatalf("late is %t after %d fetches", s.late(), i.fetches.Load())
			}
		}
		if n := i.fetches.Load() - 1; n < 40 || n > 100 { // in ten minutes
			t.Errorf("%d attempts in ten minutes", n)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		_, err := s.get(t.Context())
		if e := asError(t, err); e.Detail != "down" {
			t.Errorf("after its end: %v", err)
		}
		before, start := i.fetches.Load(), time.Now()
		for range 100 {
			if _, err := s.get(t.Context()); err == nil {
				t.Error("a session that has ended was given")
			}
		}
		if n := i.fetches.Load() - before; n > 1 || time.Since(start) != 0 {
			t.Errorf("%d attempts by 100 calls at once, in %v", n, time.Since(start))
		}
		i.err = nil
		time.Sleep(maxRetry)
		if c, err := s.get(t.Context()); err != nil || !strings.HasPrefix(c.id, "session-") {
			t.Errorf("when it is back: %v", err)
		}
		synctest.Wait() // for the log
		if text := logs.String(); strings.Count(text, "\n") != 2 || !strings.Contains(text, "down") || !strings.Contains(text, "refreshed again") {
			t.Errorf("logged %s", text)
		}
	})
}

// TestFirstFetchIsShared: each of many callers waits for one fetch, no longer than its own context
// allows; the fetch does not end with any of them.
func TestFirstFetchIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{life: time.Hour, takes: 10 * time.Second}
		s, _ := i.source(t)
		var wg sync.WaitGroup
		for n := range 64 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n%2*10+5)*time.Second)
				defer cancel()
				start := time.Now()
				_, err := s.get(ctx)
				if n%2 == 0 && (!errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 5*time.Second) || n%2 == 1 && err != nil {
					t.Errorf("caller %d: %v after %v", n, err, time.Since(start))
				}
			})
		}
		wg.Wait()
		if n := i.fetches.Load(); n != 1 {
			t.Errorf("%d fetches", n)
		}
	})
}

// TestRenew fetches for a credential that was rejected, once for all who had it, and not over and
// over.
func TestRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{life: time.Hour, takes: time.Second}
		s, _ := i.source(t)
		first, err := s.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				if c, err := s.renew(t.Context(), first); err != nil || c.id != "session-2" {
					t.Errorf("renewed: %v, %v", c.id, err)
				}
			})
		}
		wg.Wait()
		if c, err := s.renew(t.Context(), first); err != nil || c.id != "session-2" {
			t.Errorf("a late rejection of the first: %v, %v", c.id, err)
		}
		second := credential{id: "session-2"}
		if c, err := s.renew(t.Context(), second); err != nil || c != second || i.fetches.Load() != 2 {
			t.Errorf("rejected again at once: %v, %v, %d fetches", c.id, err, i.fetches.Load())
		}
		time.Sleep(renewPause)
		i.err = &kmsclient.Error{Reason: kmsclient.Denied}
		if _, err := s.renew(t.Context(), second); asError(t, err).Class() != kmsclient.ClassDenied {
			t.Errorf("no other: %v", err)
		}
		s.want(t, "until it ends", 2)
	})
}

// TestFilesEndThePause: once an operator has replaced what was wrong, nobody waits for the next
// attempt.
func TestFilesEndThePause(t *testing.T) {
	path := writeFile(t, "token", "old")
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{life: time.Hour, err: &kmsclient.Error{Reason: kmsclient.Denied}}
		s, _ := i.source(t, path, "", "/none")
		for range 10 {
			if _, err := s.get(t.Context()); err == nil {
				t.Fatal("no error")
			}
		}
		if n := i.fetches.Load(); n != 1 {
			t.Errorf("%d fetches", n)
		}
		replaceFile(t, path, "another")
		i.err = nil
		if c, err := s.get(t.Context()); err != nil || c.id != "session-2" {
			t.Errorf("%v, %v", c.id, err)
		}
	})
}

// TestCloseEndsTheFetch: Close does not wait for a service that is silent, and nobody waits for it
// either.
func TestCloseEndsTheFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{life: time.Hour, takes: time.Hour}
		s, logs := i.source(t)
		got := make(chan error)
		go func() {
			_, err := s.get(t.Context())
			got <- err
		}()
		synctest.Wait()
		start := time.Now()
		s.close()
		if err := <-got; !errors.Is(err, errClosed) || time.Since(start) != 0 || logs.String() != "" {
			t.Errorf("%v after %v, log %q", err, time.Since(start), logs)
		}
		if _, err := s.renew(t.Context(), credential{}); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) { // a service that never answers ends by itself
		i := &issuer{takes: time.Hour}
		s, _ := i.source(t)
		start := time.Now()
		if _, err := s.get(t.Context()); err == nil || time.Since(start) != fetchTime {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}
