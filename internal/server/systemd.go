package server

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// sockets are the listening sockets that systemd passes to the process, by name.
type sockets map[string][]net.Listener

// inheritedSockets returns the sockets that systemd passes. Without systemd there are none.
func inheritedSockets() (sockets, error) {
	passed := make(sockets)
	var wrong error
	for name, files := range activation.FilesWithNames() {
		for _, f := range files {
			l, err := net.FileListener(f) // a copy
			_ = f.Close()
			if err != nil { // a datagram socket, for example
				wrong = problem.New("write ListenStream= in the socket unit", "the socket %q that systemd passes does not accept connections: %w", name, err)
				continue
			}
			passed[name] = append(passed[name], l)
		}
	}
	if wrong != nil {
		passed.close()
		return nil, wrong
	}
	return passed, nil
}

func (s sockets) close() {
	for _, list := range s {
		for _, l := range list {
			_ = l.Close() // nothing was accepted
		}
	}
}

// check compares the sockets with the listeners that use them.
func (s sockets) check(listeners []config.Listener) error {
	used := make(map[string]bool)
	for i, l := range listeners {
		name, ok := l.SystemdName()
		if !ok {
			continue
		}
		used[name] = true
		if len(s[name]) == 0 {
			return problem.New("start the socket unit, and give it FileDescriptorName="+name, "listener %s: systemd passes no socket of this name%s", l.Address, s.names())
		}
		for _, socket := range s[name] {
			if p := l.CheckSocket(fmt.Sprintf("listeners[%d]", i), socket.Addr()); p != nil {
				return problem.New(p.Hint, "listener %s: %s: %s", l.Address, p.Path, p.Text)
			}
		}
	}
	for name := range s {
		if !used[name] {
			// Clients would connect to it and wait forever.
			return problem.New(fmt.Sprintf("write `address: systemd://%s` under listeners, or disable the socket unit", name),
				"systemd passes the socket %q, and no listener uses it", name)
		}
	}
	return nil
}

// names lists the sockets for an error.
func (s sockets) names() string {
	if len(s) == 0 {
		return ", or any other"
	}
	var names []string
	for name := range s {
		names = append(names, name)
	}
	slices.Sort(names)
	return ": it passes " + strings.Join(names, ", ")
}

// notify reports a state of sd_notify(3) to systemd. Without systemd it does nothing.
func (s *Server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("systemd cannot be notified", "error", err)
	}
}

// watchdog reports twice in each WatchdogSec= that the process works, as long as the report of
// /readyz is made. It returns when ctx ends.
func (s *Server) watchdog(ctx context.Context) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.Warn("systemd's watchdog is not understood", "error", err)
	}
	if err != nil || interval <= 0 {
		return
	}
	periodic.Run(ctx, max(interval/2, time.Millisecond), func() {
		s.ready()
		s.notify(daemon.SdNotifyWatchdog)
	})
}

// announce tells systemd when the proxy accepts connections, when it serves and when it drains.
func (s *Server) announce(serving context.Context) {
	for serving.Err() == nil && !s.proxy.Ready().Ready {
		_ = periodic.Wait(serving, 5*time.Millisecond) // the loop checks serving
	}
	if serving.Err() == nil {
		s.notify(daemon.SdNotifyReady + "\nSTATUS=listening")
		select {
		case <-s.fleet.gate:
			s.log.Info("serving")
			s.notify("STATUS=serving")
			<-serving.Done()
		case <-serving.Done():
		}
	}
	s.notify(daemon.SdNotifyStopping + "\nSTATUS=draining")
}
