package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	core "k8s.io/api/core/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// wantUntouched checks that a node is as it was before, and that its API server works.
func (n *node) wantUntouched(before []byte) {
	n.t.Helper()
	if !bytes.Equal(n.read(manifest), before) {
		n.t.Error("the API server's manifest is not as before")
	}
	if n.read(podFile) != nil || n.read(configFile) != nil {
		n.t.Error("the proxy's Pod or its configuration is there still")
	}
	n.run(0, "nothing", "kubeadm", "status")
	n.waitReady()
}

// TestRollsBack has enabling fail in each of its steps.
func TestRollsBack(t *testing.T) {
	t.Parallel()
	var stuck atomic.Bool
	var listen string
	n := newNode(t, func(p *core.Pod) bool {
		return stuck.Load() && strings.Contains(strings.Join(p.Spec.Containers[0].Command, " "), listen) && p.Name == "kube-apiserver"
	})
	listen = n.listen
	before := n.read(manifest)
	n.create("s", n.env.Clear.Value("s"))
	soon := []string{"--local-key", keyFile, "--create-key", "--timeout", "15s"}

	// The image cannot be pulled.
	n.run(3, "all files are as they were before", n.enable(append(soon, "--image", "registry.example.com/missing:1")...)...)
	n.wantUntouched(before)

	// The KMS does not answer.
	if err := os.MkdirAll(n.root+"/run/kms", 0o700); err != nil {
		t.Fatal(err)
	}
	n.run(3, "main", n.enable("--plugin", "unix:///run/kms/none.sock", "--timeout", "15s")...)
	n.wantUntouched(before)

	// The API server does not start again.
	stuck.Store(true)
	out := n.run(3, "all files are as they were before", n.enable(soon...)...)
	if !strings.Contains(out, "/var/log/pods") {
		t.Errorf("it does not say where logs are:\n%s", out)
	}
	n.wantUntouched(before)

	// The operator interrupts it.
	cmd, interrupted := n.command(n.enable(soon[:3]...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	harness.Eventually(t, within, "the manifest to be changed", func() error {
		select {
		case err := <-ended:
			return fmt.Errorf("the command has ended: %w: %w\n%s", harness.ErrStop, err, interrupted)
		default:
		}
		if bytes.Equal(n.read(manifest), before) {
			return errors.New("it is as before")
		}
		return nil
	})
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-ended
	if cmd.ProcessState.ExitCode() != 3 || !strings.Contains(interrupted.String(), "interrupted") {
		t.Errorf("exit code %d:\n%s", cmd.ProcessState.ExitCode(), interrupted)
	}
	n.wantUntouched(before)

	// After all that, it works.
	stuck.Store(false)
	n.run(0, "uses the proxy", n.enable(soon[:3]...)...)
	n.check("s", n.env.Clear.Value("s"))

	// A newer image that does not start: the one before is taken again.
	pod := n.read(podFile)
	n.run(3, "all files are as they were before", n.enable("--local-key", keyFile, "--image", "registry.example.com/missing:2", "--timeout", "30s")...)
	if !bytes.Equal(n.read(podFile), pod) {
		t.Error("the proxy's Pod is not as before")
	}
	n.run(0, "everything", "kubeadm", "status")
	n.check("s", n.env.Clear.Value("s"))
}

// TestRefuses has what enable refuses before it changes anything.
func TestRefuses(t *testing.T) {
	t.Parallel()
	n := newNode(t, nil)
	before := string(n.read(manifest))
	key := []string{"--local-key", keyFile, "--create-key"}
	l, err := net.Listen("tcp", n.admin)
	if err != nil {
		t.Fatal(err)
	}
	n.run(3, "--admin "+n.admin+" cannot be listened on", n.enable(key...)...)
	l.Close()
	n.run(3, "the API server would reject the proxy's certificate", n.enable(append(key, "--listener-cert", "/etc/kubernetes/pki/apiserver.crt", "--listener-key", "/etc/kubernetes/pki/apiserver.key")...)...)
	n.run(3, "the proxy would reject the API server's client certificate", n.enable(append(key, "--listener-client-ca", "/etc/kubernetes/pki/ca.crt")...)...)
	n.run(3, "no such file", n.enable(append(key, "--listener-cert", "/etc/none.crt")...)...)
	n.run(3, "server.key", n.enable(append(key, "--listener-key", "/etc/kubernetes/pki/apiserver.key")...)...)
	if n.read(keyFile) != nil || n.read(configFile) != nil {
		t.Error("a refusal left a file behind")
	}
	if string(n.read(manifest)) != before {
		t.Error("a refusal changed the manifest")
	}
}
