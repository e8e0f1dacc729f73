package kubeadm

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// counter is a client that counts up in a Secret for as long as it runs, one update at a time. The
// API server is away now and then, so an update that failed may have been applied or not; one that
// was acknowledged must not be lost.
type counter struct {
	n                     *node
	acknowledged, applied int // the least and the most that the Secret may hold
	wrong                 []string
	stop                  context.CancelFunc
	wait                  sync.WaitGroup
}

func (n *node) count() *counter {
	n.t.Helper()
	n.create("counter", "0")
	ctx, stop := context.WithCancel(context.Background())
	c := &counter{n: n, stop: stop}
	c.wait.Go(func() {
		for ctx.Err() == nil {
			c.step(ctx)
			time.Sleep(20 * time.Millisecond)
		}
	})
	n.t.Cleanup(func() {
		stop()
		c.wait.Wait()
	})
	return c
}

func (c *counter) step(ctx context.Context) {
	s, err := c.n.client.CoreV1().Secrets("default").Get(ctx, "counter", meta.GetOptions{})
	if err != nil {
		if apierrors.IsNotFound(err) {
			c.wrong = append(c.wrong, "the Secret is gone")
		}
		return // the API server is away
	}
	at, err := c.judge(s)
	if err != nil {
		c.wrong = append(c.wrong, err.Error())
		return
	}
	s.Data["value"] = []byte(strconv.Itoa(at + 1))
	c.applied = at + 1
	_, err = c.n.client.CoreV1().Secrets("default").Update(ctx, s, meta.UpdateOptions{})
	switch {
	case err == nil:
		c.acknowledged = at + 1
	case apierrors.IsConflict(err):
		// An update before it, which seemed to fail, or reencrypt.
	}
}

func (c *counter) judge(s *core.Secret) (int, error) {
	at, err := strconv.Atoi(string(s.Data["value"]))
	if err != nil || at < c.acknowledged || at > c.applied {
		return 0, fmt.Errorf("the counter is %q, want %d to %d", s.Data["value"], c.acknowledged, c.applied)
	}
	return at, nil
}

// done stops the client and checks what it saw.
func (c *counter) done() {
	c.n.t.Helper()
	c.stop()
	c.wait.Wait()
	for _, w := range c.wrong[:min(3, len(c.wrong))] {
		c.n.t.Error(w)
	}
	s, err := c.n.client.CoreV1().Secrets("default").Get(c.n.t.Context(), "counter", meta.GetOptions{})
	if err == nil {
		_, err = c.judge(s)
	}
	if err != nil {
		c.n.t.Error(err)
	}
	if c.acknowledged < 50 {
		c.n.t.Errorf("only %d updates: this proves nothing", c.acknowledged)
	}
	c.n.t.Logf("%d updates were acknowledged", c.acknowledged)
}
