package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// sockets are what systemd has bound for this process, by name.
type sockets map[string][]net.Listener

// inheritedSockets takes the sockets that systemd passes. Without systemd there are none.
func inheritedSockets() (sockets, error) {
	passed := make(sockets)
	var wrong error
	for name, files := range activation.FilesWithNames() {
		for _, f := range files {
			l, err := net.FileListener(f) // a copy
			_ = f.Close()
			if err != nil { // a datagram socket, for example
				wrong = &failure{code: exitFailure, err: fmt.Errorf("the socket %q that systemd passes does not accept connections: %w", name, err), hint: "write ListenStream= in the socket unit"}
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

// check compares the sockets with the listeners that take them.
func (s sockets) check(listeners []config.Listener) error {
	taken := make(map[string]bool)
	for i, l := range listeners {
		name, ok := l.SystemdName()
		if !ok {
			continue
		}
		taken[name] = true
		if len(s[name]) == 0 {
			return &failure{
				code: exitFailure, err: fmt.Errorf("listener %s: systemd passes no socket of this name%s", l.Address, s.names()),
				hint: "start the socket unit, and give it FileDescriptorName=" + name,
			}
		}
		for _, socket := range s[name] {
			if p := l.CheckSocket(fmt.Sprintf("listeners[%d]", i), socket.Addr()); p != nil {
				return &failure{code: exitFailure, err: fmt.Errorf("listener %s: %s: %s", l.Address, p.Path, p.Text), hint: p.Hint}
			}
		}
	}
	for name := range s {
		if !taken[name] {
			// Clients would connect to it and wait for ever.
			return &failure{
				code: exitFailure, err: fmt.Errorf("systemd passes the socket %q, and no listener takes it", name),
				hint: fmt.Sprintf("write `address: systemd://%s` under listeners, or disable the socket unit", name),
			}
		}
	}
	return nil
}

// names lists what there is, for an error.
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

// notifier tells systemd how the service is. Without systemd it does nothing.
type notifier struct{ log *slog.Logger }

// tell sends a state of sd_notify(3).
func (n notifier) tell(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("systemd cannot be notified", "error", err)
	}
}

// watch tells systemd that the process works, twice in each WatchdogSec=, as long as alive returns.
// It returns when ctx ends.
func (n notifier) watch(ctx context.Context, alive func()) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn("systemd's watchdog is not understood", "error", err)
	}
	if err != nil || interval <= 0 {
		return
	}
	ticker := time.NewTicker(max(interval/2, time.Millisecond))
	defer ticker.Stop()
	for {
		alive()
		n.tell(daemon.SdNotifyWatchdog)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// announce tells systemd once the proxy accepts connections, and that it drains.
func (a *app) announce(serving context.Context) {
	n := notifier{a.log}
	for serving.Err() == nil && !a.proxy.Ready().Ready {
		select {
		case <-serving.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
	if serving.Err() == nil {
		n.tell(daemon.SdNotifyReady + "\nSTATUS=serving")
		<-serving.Done()
	}
	n.tell(daemon.SdNotifyStopping + "\nSTATUS=draining")
}
