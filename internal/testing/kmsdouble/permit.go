package kmsdouble

import (
	"cmp"
	"slices"
)

// Permit has a caller do these actions only from now on, on every key; none at all if there are
// none. A caller that it was not called for may do everything.
func (d *Double) Permit(accessKeyID string, actions ...string) {
	d.callersMu.Lock()
	defer d.callersMu.Unlock()
	d.permitted[accessKeyID] = slices.Clone(actions)
}

// PermitAll has a caller do everything again.
func (d *Double) PermitAll(accessKeyID string) {
	d.callersMu.Lock()
	defer d.callersMu.Unlock()
	delete(d.permitted, accessKeyID)
}

// mayDo is the error of a caller who lacks the permission for an action, or nil.
func (d *Double) mayDo(caller AccessKey, action, keyID string) *apiError {
	d.callersMu.Lock()
	defer d.callersMu.Unlock()
	if actions, limited := d.permitted[caller.ID]; !limited || slices.Contains(actions, action) {
		return nil
	}
	return &apiError{403, "Forbidden.NoPermission", "This operation for " + cmp.Or(keyID, "key") + " is forbidden by permission system."}
}
